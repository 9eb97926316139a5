"""Schedules at equal training: iterative against one shot, pruning-aware against post-hoc, on a real encoder and a small decoder.

    python bench/quality/schedules.py stdlib-lm --validation      # to choose settings: no test text is read
    python bench/quality/schedules.py stdlib-lm --heads 0.5 -o schedules-stdlib-lm.json
    python bench/quality/schedules.py minilm --heads 0.5 -o schedules-minilm.json
    python bench/quality/schedules.py stdlib-lm --criterion magnitude_l2 --cut-only -o schedules-cut-only-stdlib-lm.json

Every way sees the same number of batches of the same size out of the same texts, distils from the same dense model and compensates
on the same batches (with --cut-only not at all): one shot trains for all steps after its cut, iterative for an equal part of them
after each of its cuts (late: for 0.7 of them after the last; two: for an eighth of them between two cuts), pruning-aware for half
of them with gates and for half after the cut. Training texts are never test texts.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from torch import nn

import headprune as hp
from headprune.evaluation.tasks import Task, build_task
from headprune.sources import open_model

CUTS = 4  # of the iterative ways


@dataclass(frozen=True)
class Subject:
    """A model, its task and how it is distilled."""

    dense: nn.Module
    task: Task
    criterion: str
    distil: hp.Distillation
    lr: float

    def recovery(self, steps: int, last: float = 1) -> hp.RecoverySettings:
        return hp.RecoverySettings(steps=steps, lr=self.lr, teacher=True, options={"distil": self.distil}, last=last)


def minilm(validation: bool, seed: int) -> Subject:
    dense, tokenizer = open_model("minilm")
    task = build_task("docstring-retrieval", tokenizer, batch=16, calibration_pairs=256, validation=validation, seed=seed)
    return Subject(dense, task, "fisher_least_squares", hp.Distillation(hidden=1.0, embedding=1.0, similarity=1.0), 2e-4)


def stdlib_lm(validation: bool, seed: int) -> Subject:
    dense, tokenizer = open_model("stdlib-lm")
    task = build_task("standard-library-text", tokenizer, batch=4, calibration_windows=128, seed=seed)
    if validation:
        half = len(task.calibration) // 2
        task.test = task.test.new_tensor([row.tolist() for batch in task.calibration[half:] for row in batch["input_ids"]])
        task.calibration = task.calibration[:half]
    return Subject(dense, task, "fisher", hp.Distillation(logits=1.0, hidden=0.5, temperature=1.0), 5e-4)


SUBJECTS = {"minilm": minilm, "stdlib-lm": stdlib_lm}
Way = Callable[[Subject, dict[str, Any], int], hp.ScheduleResult]


def untrained(subject: Subject, call: dict[str, Any], steps: int) -> hp.ScheduleResult:
    return hp.one_shot(**call)


def one_shot(subject: Subject, call: dict[str, Any], steps: int) -> hp.ScheduleResult:
    return hp.one_shot(recover=subject.recovery(steps), **call)


def iterative(spacing: str, last: int = 1, cuts: int = CUTS) -> Way:
    def run(subject: Subject, call: dict[str, Any], steps: int) -> hp.ScheduleResult:
        return hp.iterative(steps=cuts, spacing=spacing, recover=subject.recovery(steps // (cuts - 1 + last), last), **call)

    return run


def pruning_aware(method: str) -> Way:
    def run(subject: Subject, call: dict[str, Any], steps: int) -> hp.ScheduleResult:
        options = {"method": method, "steps": steps // 2, "lr": subject.lr, "teacher": True, "distil": subject.distil}
        return hp.pruning_aware(recover=subject.recovery(steps - steps // 2), dropout=False, **options, **call)

    return run


WAYS: dict[str, Way] = {
    "one_shot_untrained": untrained,
    "one_shot": one_shot,
    "iterative_linear": iterative("linear"),
    "iterative_cubic": iterative("cubic"),
    "iterative_late": iterative("linear", last=7),
    "iterative_two": iterative("linear", last=7, cuts=2),
    **{f"pruning_aware_{name}": pruning_aware(name) for name in sorted(hp.schedules.gate_methods())},
}


def rows(arguments: argparse.Namespace):
    """One dict for each way and fraction, as they are measured; the dense model first. ratio: quality over the dense model's, of a
    perplexity the other way round, so that higher is better."""
    subject = SUBJECTS[arguments.model](arguments.validation, arguments.seed)
    task, train, split = subject.task, subject.task.training(), "validation" if arguments.validation else "test"
    original = task.evaluate(subject.dense)
    criterion = arguments.criterion or subject.criterion
    about = {
        "model": arguments.model, "split": split, "seed": arguments.seed, "steps": arguments.steps, "batch": task.batch,
        "criterion": criterion, "compensated": not arguments.cut_only,
    }  # fmt: skip
    yield {**about, "way": "dense", "heads": 0.0, **original, "ratio": 1.0}
    for fraction in arguments.heads:
        for way in arguments.ways:
            started = time.process_time()
            call = {
                "model": subject.dense, "batches": task.calibration, "budget": hp.Budget(heads=fraction), "train": train,
                "criterion": criterion, "compensate": not arguments.cut_only, "loss_fn": task.loss, "forward": task.forward,
                "seed": arguments.seed, "metric": lambda model: 0.0,  # quality is measured once, in the end
            }  # fmt: skip
            found = WAYS[way](subject, call, arguments.steps)
            seconds, quality = time.process_time() - started, task.evaluate(found.model)
            ratio = quality[task.headline] / original[task.headline]
            yield {
                **about, "way": way, "heads": fraction, "removed": found.plan.removed_heads, **quality, "cpu_seconds": seconds,
                "ratio": ratio if task.higher_is_better else 1 / ratio, "kept": [len(heads) for heads in found.plan.values()],
            }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=list(SUBJECTS))
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--heads", nargs="+", type=float, default=[0.5], help="fractions to remove")
    parser.add_argument("--criterion", help="of the heads to keep (default: the model's recipe's)")
    parser.add_argument("--cut-only", action="store_true", help="no output projection is re-solved")
    parser.add_argument("--steps", type=int, default=240, help="training steps of each way in all")
    parser.add_argument("--seed", type=int, default=0, help="of the calibration and training data and of their order")
    parser.add_argument("--validation", action="store_true", help="quality on held-out calibration texts instead of test texts")
    parser.add_argument("-o", "--output", type=Path, help="where to write the rows as JSON")
    arguments, found = parser.parse_args(), []
    for row in rows(arguments):
        found.append(row)
        quality = " ".join(f"{name} {value:.4f}" for name, value in row.items() if name in ("mrr", "accuracy@1", "perplexity"))
        kept, seconds = " ".join(map(str, row.get("kept", []))), row.get("cpu_seconds", 0.0)
        print(
            f"{row['way']:28s} {row['heads']:4.2f}  {quality}  ratio {row['ratio']:.4f}  {seconds:6.1f} CPU s  {kept}", flush=True
        )
        if arguments.output:
            arguments.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
