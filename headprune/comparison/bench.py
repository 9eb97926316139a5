"""The measurements of one method: quality, sizes, latency, and what the same fine-tune gives back."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

from headprune.comparison.masks import held
from headprune.comparison.method import Compressed, Method, Refused, Subject
from headprune.comparison.record import ComparisonFolder
from headprune.comparison.row import MethodRow
from headprune.comparison.sizes import compact_bytes, file_bytes, nonzero_parameters, plain
from headprune.errors import InvalidInput, UnsupportedModel
from headprune.evaluation import Interval, paired_bootstrap
from headprune.evaluation.cost import model_flops
from headprune.evaluation.evaluate import count_of, tell_few, values_of
from headprune.evaluation.latency import measure_latency
from headprune.evaluation.machine import machine_name
from headprune.evaluation.metric import Metric
from headprune.evaluation.tasks import Task
from headprune.models.placement import device_of, trainer_options
from headprune.recovery import quantise, recover
from headprune.scoring.passes import in_eval_mode
from headprune.surgery.savings import count_parameters

log = logging.getLogger("headprune")
HELD_OUT = 16  # batches that losses are measured on, at most; at least one, and no more than a fifth of the training data
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Texts:
    """A task's training batches, split: for fitting (calibration is a part of train), and for losses that nothing was fitted to."""

    train: Sequence[Any]
    held_out: Sequence[Any]
    calibration: Sequence[Any]

    @classmethod
    def of(cls, task: Task) -> Texts:
        """Raises InvalidInput where there are fewer than two batches."""
        batches = list(task.training())
        if len(batches) < 2:
            raise InvalidInput(f"task {task.name} has {len(batches)} training batches; a comparison needs at least 2.")
        count = max(1, min(HELD_OUT, len(batches) // 5))
        train = batches[:-count]
        return cls(train, batches[-count:], train[: max(1, len(task.calibration))])


class Bench:
    """Measures one method at a time, always against the dense model of `subject`."""

    def __init__(
        self, subject: Subject, texts: Texts, steps: int, lr: float | None, repeats: int, seed: int, kept: ComparisonFolder
    ) -> None:
        self.subject, self.task, self.texts = subject, subject.task, texts
        self.steps, self.lr, self.repeats, self.seed, self.kept = steps, lr, repeats, seed, kept

    @cached_property
    def dense(self) -> Metric | None:
        """The dense model's examples of the headline, that differences are taken from."""
        with in_eval_mode(self.subject.model):
            found = self.task.examples(self.subject.model) or {}
        tell_few(self.task, count_of(self.task, found))
        return found.get(self.task.headline)

    def measured(self, method: Method, progress: Progress | None) -> MethodRow:
        """The method's row, which is also kept; one with the reason where it is refused."""
        row = MethodRow(method.name, method.label, method.kind, method.granularity, method.version, method.kernels)
        log.info("comparing: %s", method.label)
        try:
            found = method.compress(self.subject)
        except (Refused, UnsupportedModel, InvalidInput) as reason:
            return replace(row, refused=str(reason))
        row = self.as_compressed(row, found)
        if self.steps:
            row = self.tuned(row, found, progress)
            if row.tuned_steps is None:
                return row  # not kept, to be tried again: what went wrong may be put right
        self.kept.add(row)
        return row

    def as_compressed(self, row: MethodRow, found: Compressed) -> MethodRow:
        quality, difference = self.quality(found.model)
        in_file = file_bytes(found.model)
        return replace(
            row, note=found.note, parameters=count_parameters(found.model), nonzero=nonzero_parameters(found.model),
            file_bytes=in_file, compact_bytes=compact_bytes(found, in_file), compact=found.compact, quality=quality,
            difference=None if row.method == "dense" else difference, loss=self.loss(found.model),
            flops_share=self.flops_share(found.model), **self.latency(found.model),
        )  # fmt: skip

    def tuned(self, row: MethodRow, found: Compressed, progress: Progress | None) -> MethodRow:
        """After the fine-tune, which keeps the pattern of zeros and knows of rounded weights; the sizes are those of before. The
        note says where it diverged."""
        model = found.model if found.form is None else self.subject.copy()
        options: dict[str, Any] = {} if found.teaches is None else {"teacher": self.subject.model, "distil": found.teaches}
        options |= trainer_options(device_of(self.subject.model))
        with held(model, found.masks):
            done = recover(
                model, self.texts.train, loss_fn=self.task.loss, steps=self.steps, lr=self.lr, seed=self.seed, dropout=False,
                quantise=found.form, output_dir=self.kept.tuning(row.method), progress=progress, **options,
            )  # fmt: skip
        if done.diverged:
            return replace(row, note="; ".join(filter(None, (row.note, f"the fine-tune failed: {done.stopped_because}"))))
        if found.form is not None:
            quantise(model, found.form)
        quality, difference = self.quality(model)
        return replace(row, tuned_quality=quality, tuned_difference=difference, tuned_loss=self.loss(model), tuned_steps=done.steps)

    def quality(self, model: nn.Module) -> tuple[dict[str, float], Interval | None]:
        """(the task's metrics, the headline's difference from the dense model's where there are examples)."""
        with in_eval_mode(model):
            examples = self.task.examples(model)
            if examples is None:
                return self.task.evaluate(model), None
        one, other = self.dense, examples.get(self.task.headline)
        if one is None or other is None or len(other.rows) < 2:
            return values_of(examples), None
        return values_of(examples), paired_bootstrap(one, other)

    @torch.no_grad()
    def loss(self, model: nn.Module) -> float:
        """Mean of the task's loss over the batches that were set aside."""
        with in_eval_mode(model):
            losses = [float(self.task.loss(model, batch).mean()) for batch in self.texts.held_out]
        return sum(losses) / len(losses)

    def flops_share(self, model: nn.Module) -> float | None:
        """None for quantised weights, whose products the counter does not know."""
        inputs = self.task.latency_inputs()
        return model_flops(model, inputs) / model_flops(self.subject.model, inputs) if plain(model) else None

    def latency(self, model: nn.Module) -> dict[str, Any]:
        """The fields of a row; none for 0 repeats."""
        if not self.repeats:
            return {}
        models = {"dense": self.subject.model, "model": model}
        with in_eval_mode(self.subject.model):
            timed = measure_latency(models, self.task.latency_inputs(), self.repeats)
        share = timed["model"].p50_ms / timed["dense"].p50_ms
        return {"latency_p50_ms": timed["model"].p50_ms, "latency_share": share, "machine": machine_name(device_of(model))}
