"""Schedules at equal training: iterative against one shot, pruning-aware against post-hoc, on MiniLM and docstring retrieval.

    python bench/quality/schedules.py --validation      # to choose settings: no test pair is read
    python bench/quality/schedules.py --heads 0.5 --steps 120 -o schedules.json

Every way sees the same number of batches of the same texts, distils from the same dense model and compensates on the same batches:
one shot trains for all steps after its cut, iterative for an equal part of them after each of its cuts, pruning-aware for half of
them with gates and for half after the cut.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import headprune as hp
from headprune.evaluation.tasks import build_task
from headprune.sources import open_model

STEPS = 4  # of the iterative ways


def recovery(steps: int, lr: float) -> hp.RecoverySettings:
    return hp.RecoverySettings(steps=steps, lr=lr, teacher=True)


def one_shot(call: dict, steps: int, lr: float) -> hp.ScheduleResult:
    return hp.one_shot(recover=recovery(steps, lr), **call)


def untrained(call: dict, steps: int, lr: float) -> hp.ScheduleResult:
    return hp.one_shot(**call)


def iterative(spacing: str) -> Callable[..., hp.ScheduleResult]:
    def run(call: dict, steps: int, lr: float) -> hp.ScheduleResult:
        return hp.iterative(steps=STEPS, spacing=spacing, recover=recovery(steps // STEPS, lr), **call)

    return run


def pruning_aware(method: str) -> Callable[..., hp.ScheduleResult]:
    def run(call: dict, steps: int, lr: float) -> hp.ScheduleResult:
        options = {"method": method, "steps": steps // 2, "lr": lr, "teacher": True, "dropout": False}
        return hp.pruning_aware(recover=recovery(steps - steps // 2, lr), **options, **call)

    return run


WAYS = {
    "one_shot_untrained": untrained,
    "one_shot": one_shot,
    "iterative_linear": iterative("linear"),
    "iterative_cubic": iterative("cubic"),
    **{f"pruning_aware_{name}": pruning_aware(name) for name in sorted(hp.schedules.gate_methods())},
}


def rows(arguments: argparse.Namespace):
    """One dict for each way and fraction, as they are measured; the dense model first."""
    dense, tokenizer = open_model("minilm")
    options = {"calibration_pairs": arguments.pairs, "batch": arguments.batch, "test_pairs": arguments.test_pairs}
    task = build_task("docstring-retrieval", tokenizer, max_tokens=64, validation=arguments.validation, **options)
    data = task.calibration
    split, original = "validation" if arguments.validation else "test", task.evaluate(dense)
    yield {"split": split, "way": "dense", "heads": 0.0, **original, "ratio": 1.0, "seconds": 0.0}
    for fraction in arguments.heads:
        for way in arguments.ways:
            started = time.perf_counter()
            call = {
                "model": dense, "batches": data[: arguments.calibration], "budget": hp.Budget(heads=fraction), "train": data,
                "criterion": "fisher_least_squares", "loss_fn": task.loss, "forward": task.forward, "seed": arguments.seed,
                "metric": lambda model: 0.0,  # quality is measured once, in the end
            }  # fmt: skip
            found = WAYS[way](call, arguments.steps, arguments.lr)
            seconds, quality = time.perf_counter() - started, task.evaluate(found.model)
            yield {
                "split": split, "way": way, "heads": fraction, "removed": found.plan.removed_heads, "steps": arguments.steps,
                "batch": arguments.batch, "lr": arguments.lr, "seed": arguments.seed, **quality, "seconds": seconds,
                "kept": [len(heads) for heads in found.plan.values()], "ratio": quality["mrr"] / original["mrr"],
            }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--heads", nargs="+", type=float, default=[0.5, 0.75], help="fractions to remove")
    parser.add_argument("--steps", type=int, default=240, help="training steps of each way in all")
    parser.add_argument("--batch", type=int, default=16, help="pairs in a batch")
    parser.add_argument("--test-pairs", type=int, default=600)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--pairs", type=int, default=1920, help="calibration pairs to train on")
    parser.add_argument("--calibration", type=int, default=12, help="batches that scores and compensation read")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--validation", action="store_true", help="pairs out of the calibration half instead of test pairs")
    parser.add_argument("-o", "--output", type=Path, help="where to write the rows as JSON")
    arguments, found = parser.parse_args(), []
    print(f"{'way':28s} {'heads':>6s} {'mrr':>7s} {'ratio':>6s} {'acc@1':>6s} {'s':>6s}  heads kept by layer")
    for row in rows(arguments):
        found.append(row)
        print(
            f"{row['way']:28s} {row['heads']:6.2f} {row['mrr']:7.4f} {row['ratio']:6.3f} {row['accuracy@1']:6.3f} "
            f"{row['seconds']:6.1f}  {' '.join(map(str, row.get('kept', [])))}",
            flush=True,
        )
        if arguments.output:
            arguments.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
