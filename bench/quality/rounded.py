"""Quality of a pruned model in 4 or 8 bits: recovered and then rounded, or recovered for the rounding, at equal training.

    python bench/quality/rounded.py stdlib-lm -o bench/results/rounded-stdlib-lm-MACHINE-DATE.json

Fisher scores, heads by global ranking, outputs re-solved, then distilled from the dense model; three seeds (calibration and order
of the batches). Ratios are of quality to the dense model's in floating point.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from quality.rows import told

import headprune as hp
from headprune.evaluation.tasks import Task, build_task
from headprune.recovery.quantise import FORMS
from headprune.sources import EMBEDDED, open_model


def rows(name: str, seeds: int, fraction: float, steps: int, forms: list[str]) -> Iterator[dict[str, Any]]:
    dense, tokenizer = open_model(name)
    for seed in range(seeds):
        task = build_task(EMBEDDED[name].task, tokenizer, seed=seed)
        original = task.evaluate(dense)[task.headline]
        plan = hp.plan(hp.score(dense, task.calibration, "fisher", loss_fn=task.loss), hp.Budget(heads=fraction))
        pruned = copy.deepcopy(dense)
        hp.prune(pruned, plan, task.calibration, forward=task.forward)
        recovered = {}
        for form in (None, *forms):
            recovered[form] = model = copy.deepcopy(pruned)
            training = list(task.training())
            hp.recover(model, training, loss_fn=task.loss, teacher=dense, steps=steps, seed=seed, quantise=form)
        fitted = {("dense", form): dense for form in (None, *forms)} | {("pruned", form): pruned for form in (None, *forms)}
        fitted |= {("recovered", form): recovered[None] for form in (None, *forms)}
        for form in forms:
            fitted |= {("recovered for the rounding", form): recovered[form], (f"recovered for {form}", None): recovered[form]}
        for (label, form), model in fitted.items():
            yield {
                "model": name, "seed": seed, "heads": fraction, "steps": steps, "fitted": label, "weights": form or "as it is",
                "metric": task.headline, "ratio": quality(model, form, task) / original,
            }  # fmt: skip


def quality(model: torch.nn.Module, form: str | None, task: Task) -> float:
    rounded = copy.deepcopy(model)
    if form is not None:
        hp.recovery.quantise(rounded, form)
    return task.evaluate(rounded)[task.headline]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=EMBEDDED)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--heads", type=float, default=0.5, help="fraction to remove")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("-o", "--output", type=Path, help="where to write the rows as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    told(rows(arguments.model, arguments.seeds, arguments.heads, arguments.steps, arguments.forms), arguments.output)


if __name__ == "__main__":
    main()
