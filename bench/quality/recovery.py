"""What two CPU minutes of recovery give back after heads have gone, each way, on a real encoder and a small decoder.

    python bench/quality/recovery.py minilm --validation          # to choose settings: no test pair is read
    python bench/quality/recovery.py minilm --heads 0.5 0.75 -o recovery-minilm.json
    python bench/quality/recovery.py stdlib-lm --heads 0.5 -o recovery-stdlib-lm.json

Every way starts from the recipe's plan; all but "none" and "rewinding" from the compensated model, its feed-forwards re-solved too.
Minutes are of the process's CPU time with one thread. Training texts come from the calibration half (MiniLM: both parts of its
docstrings' pairs; the decoder: its training packages); quality is measured once, at the end.
"""

from __future__ import annotations

import argparse
import copy
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from quality.all_pairs import AllPairs
from quality.rows import told
from torch import nn

import headprune as hp
from headprune.demo.stdlib_lm import Decoder, initial_model
from headprune.demo.training import Training, random_windows, train
from headprune.evaluation.retrieval import encoded
from headprune.evaluation.tasks import build_task
from headprune.evaluation.tasks.docstrings import docstring_pairs
from headprune.evaluation.tasks.standard_library import standard_library_text
from headprune.evaluation.tasks.standard_library_text import stream_of
from headprune.evaluation.tasks.text_pairs import shuffled
from headprune.sources import open_model


@dataclass(frozen=True)
class Subject:
    """A model and what it is recovered with. arguments: more of hp.recover's. early: an earlier checkpoint, where there is one.
    wider: the task with more test data, where there is one."""

    dense: nn.Module
    task: Any
    train: list[Any]
    criterion: str
    distil: hp.Distillation
    rates: dict[str, float]
    arguments: dict[str, Any]
    early: Callable[[], nn.Module]
    wider: Any = None


def minilm(validation: bool, seed: int) -> Subject:
    """Batches as the task's, the sentences of some pairs, then their documents: 32 pairs of up to 48 tokens, because the task's own
    loss and the teacher's similarities live on the other documents of a batch (chosen on pairs of other packages, NOTES.md)."""
    dense, tokenizer = open_model("minilm")
    task = build_task("docstring-retrieval", tokenizer, validation=validation)
    pairs = docstring_pairs(validation)[0]
    random.Random(seed).shuffle(pairs)
    pairs = [pair for start in range(0, len(pairs), 256) for pair in sorted(pairs[start : start + 256], key=length)]

    groups = [pairs[start : start + 32] for start in range(0, len(pairs), 32)]
    texts = ([pair.query for pair in group] + [pair.document for pair in group] for group in shuffled(groups))
    batches = [encoded(tokenizer, some, 48) for some in texts]
    embed = lambda output, batch: pooled(output.last_hidden_state, batch["attention_mask"])  # noqa: E731
    distil = hp.Distillation(similarity=1.0, embed=embed)
    arguments = {"bf16": torch.cpu._is_avx512_bf16_supported()}
    wider = None if validation else AllPairs(tokenizer, 0)
    return Subject(dense, task, batches, "fisher_least_squares", distil, RATES["minilm"], arguments, lambda: dense, wider)


def length(pair: Any) -> int:
    return len(pair.document)


def pooled(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return (states * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)


def decoder(validation: bool, seed: int) -> Subject:
    """Windows of the text that the model was trained on; the early checkpoint is that training's at four fifths."""
    dense, tokenizer = open_model("stdlib-lm")
    task = build_task("standard-library-text", tokenizer)
    stream = stream_of(tokenizer, standard_library_text().training)
    settings = Training(batch=4, seed=1000 + seed)
    batches = [{"input_ids": rows, "labels": rows} for rows in (random_windows(stream, settings, step) for step in range(600))]

    distil = hp.Distillation(logits=1.0, hidden=0.5, temperature=1.0)
    early = lambda: early_decoder(tokenizer, stream)  # noqa: E731
    return Subject(dense, task, batches, "fisher", distil, RATES["stdlib-lm"], {}, early)


@dataclass(frozen=True)
class FirstSteps(Training):
    """The first `steps` steps of a training of `whole` steps."""

    whole: int = 1000

    def rate(self, step: int) -> float:
        return Training(steps=self.whole).rate(step)


def early_decoder(tokenizer: Any, stream: torch.Tensor) -> nn.Module:
    """The stdlib decoder after four fifths of its training."""
    original = Decoder()
    model, steps = initial_model(original, tokenizer), original.training.steps
    with tempfile.TemporaryDirectory() as folder:
        train(model, stream, FirstSteps(steps=int(0.8 * steps), whole=steps), Path(folder) / "state")
    return model


RATES = {
    "minilm": {
        "full": 1e-4,
        "lora": 5e-4,
        "distillation": 1e-4,
        "distillation_and_task": 1e-4,
        "rewinding": 1e-4,
        "lora_distillation": 5e-4,
        "lora_distillation_and_task": 3e-4,
    },
    "stdlib-lm": {
        "full": 5e-4,
        "lora": 2e-3,
        "distillation": 5e-4,
        "distillation_and_task": 5e-4,
        "rewinding": 5e-4,
        "lora_distillation": 2e-3,
        "lora_distillation_and_task": 2e-3,
    },
}
SUBJECTS = {"minilm": minilm, "stdlib-lm": decoder}
Recover = Callable[[nn.Module, Subject, dict[str, Any]], hp.Recovery]


def full(model: nn.Module, subject: Subject, options: dict[str, Any]) -> hp.Recovery:
    return hp.recover(model, subject.train, loss_fn=subject.task.loss, lr=subject.rates["full"], **options)


def lora(model: nn.Module, subject: Subject, options: dict[str, Any]) -> hp.Recovery:
    return hp.recover(model, subject.train, loss_fn=subject.task.loss, method="lora", lr=subject.rates["lora"], **options)


def distillation(model: nn.Module, subject: Subject, options: dict[str, Any]) -> hp.Recovery:
    return hp.recover(
        model, subject.train, teacher=subject.dense, distil=subject.distil, lr=subject.rates["distillation"], **options
    )  # fmt: skip


def distillation_and_task(model: nn.Module, subject: Subject, options: dict[str, Any]) -> hp.Recovery:
    """What the teacher gives and the task's own loss, as Hinton et al. 2015 add them."""
    return hp.recover(
        model, subject.train, loss_fn=subject.task.loss, teacher=subject.dense, distil=replace(subject.distil, task=1.0),
        lr=subject.rates["distillation_and_task"], **options,
    )  # fmt: skip


def lora_distillation(model: nn.Module, subject: Subject, options: dict[str, Any]) -> hp.Recovery:
    rate = subject.rates["lora_distillation"]
    return hp.recover(model, subject.train, teacher=subject.dense, distil=subject.distil, method="lora", lr=rate, **options)


def lora_distillation_and_task(model: nn.Module, subject: Subject, options: dict[str, Any]) -> hp.Recovery:
    return hp.recover(
        model, subject.train, loss_fn=subject.task.loss, teacher=subject.dense, distil=replace(subject.distil, task=1.0),
        method="lora", lr=subject.rates["lora_distillation_and_task"], **options,
    )  # fmt: skip


def rewinding(model: nn.Module, subject: Subject, options: dict[str, Any]) -> hp.Recovery:
    """Distillation from the early weights (MiniLM comes without any: from the dense weights, uncompensated)."""
    return hp.recover(
        model, subject.train, teacher=subject.dense, distil=subject.distil, lr=subject.rates["rewinding"], rewind=subject.early(),
        **options,
    )  # fmt: skip


WAYS: dict[str, Recover | None] = {
    "none": None, "compensation": None, "full": full, "lora": lora, "distillation": distillation,
    "distillation_and_task": distillation_and_task, "lora_distillation": lora_distillation,
    "lora_distillation_and_task": lora_distillation_and_task, "rewinding": rewinding,
}  # fmt: skip


def rows(name: str, fractions: list[float], ways: list[str], minutes: float, seed: int, validation: bool):
    """One dict per fraction and way, as they are measured; the dense model first."""
    subject = SUBJECTS[name](validation, seed)
    task, split = subject.task, "validation" if validation else "test"
    original, wider = task.evaluate(subject.dense), {} if subject.wider is None else subject.wider.evaluate(subject.dense)
    yield {"model": name, "split": split, "seed": seed, "heads": 0.0, "way": "dense", **original, "ratio": 1.0}
    scores = hp.score(subject.dense, task.calibration, subject.criterion, loss_fn=task.loss)
    for fraction in fractions:
        plan = hp.search_plan(subject.dense, scores, hp.Budget(heads=fraction), task.calibration, forward=task.readout).plan
        compensated = copy.deepcopy(subject.dense)
        hp.prune(compensated, plan, task.calibration, forward=task.forward, feed_forward=True)
        for way in ways:
            model = copy.deepcopy(compensated)
            if way == "none":
                model = copy.deepcopy(subject.dense)
                hp.prune(model, plan)
            started, steps, loss = time.process_time(), 0, []
            if WAYS[way] is not None:
                options = {"minutes": minutes, "clock": time.process_time, "seed": seed, "warmup": 5, **subject.arguments}
                recovery = WAYS[way](model, subject, options)
                steps, loss = recovery.steps, [recovery.losses[0][1], recovery.losses[-1][1]]
            seconds = time.process_time() - started
            found = task.evaluate(model)
            ratio = found[task.headline] / original[task.headline]
            yield {
                "model": name, "split": split, "seed": seed, "heads": fraction, "way": way, **found,
                "ratio": ratio if task.higher_is_better else 1 / ratio, **on_more_data(subject, model, wider),
                "cpu_seconds": round(seconds, 1), "steps": steps, "lr": subject.rates.get(way), "loss": loss,
            }  # fmt: skip


def on_more_data(subject: Subject, model: nn.Module, dense: dict[str, float]) -> dict[str, float]:
    name = subject.task.headline
    return {"ratio on more data": subject.wider.evaluate(model)[name] / dense[name]} if dense else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=SUBJECTS)
    parser.add_argument("--heads", nargs="+", type=float, default=[0.5, 0.75], help="fractions to remove")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--minutes", type=float, default=2.0, help="CPU minutes of each recovery")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--lr", type=float, help="in place of the way's own")
    parser.add_argument("--validation", action="store_true", help="MiniLM: pairs out of the calibration half instead of test pairs")
    parser.add_argument("-o", "--output", type=Path, help="where to write the rows as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.lr:
        RATES[arguments.model] = dict.fromkeys(WAYS, arguments.lr)
    every = (
        row
        for seed in arguments.seeds
        for row in rows(arguments.model, arguments.heads, arguments.ways, arguments.minutes, seed, arguments.validation)
    )
    told(every, arguments.output)


if __name__ == "__main__":
    main()
