"""Quality of MiniLM on docstring retrieval by criterion and fraction of heads removed, without any training.

    python bench/quality/minilm.py --validation      # to choose settings: no test pair is read
    python bench/quality/minilm.py --heads 0.25 0.5 0.65 0.75 -o minilm.json

Every method is given the same calibration batches, the same allocation and the same compensation.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import headprune as hp
from headprune.evaluation.tasks import build_task
from headprune.sources import open_model

CRITERIA = (
    "random", "magnitude_l2", "magnitude_output", "gate_gradient", "fisher", "least_squares", "fisher_least_squares",
)  # fmt: skip


def rows(criteria: list[str], fractions: list[float], validation: bool):
    """One dict per criterion and fraction, as they are measured; the dense model first."""
    dense, tokenizer = open_model("minilm")
    task = build_task("docstring-retrieval", tokenizer, validation=validation)
    split = "validation" if validation else "test"
    original = task.evaluate(dense)
    yield {"split": split, "criterion": "dense", "heads": 0.0, "kept": [12] * 6, **original, "ratio": 1.0, "seconds": 0.0}
    scores = hp.score(dense, task.calibration, criteria, loss_fn=task.loss)
    for fraction in fractions:
        for criterion in criteria:
            started = time.perf_counter()
            pruned, plan = copy.deepcopy(dense), hp.plan(scores[criterion], hp.Budget(heads=fraction))
            hp.prune(pruned, plan, task.calibration, forward=task.forward)
            seconds, found = time.perf_counter() - started, task.evaluate(pruned)
            kept = [len(heads) for heads in plan.values()]
            ratio = found["mrr"] / original["mrr"]
            yield {
                "split": split, "criterion": criterion, "heads": fraction, "kept": kept, **found, "ratio": ratio,
                "seconds": seconds,
            }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--criteria", nargs="+", default=list(CRITERIA))
    parser.add_argument("--heads", nargs="+", type=float, default=[0.25, 0.5, 0.65, 0.75], help="fractions to remove")
    parser.add_argument("--validation", action="store_true", help="pairs out of the calibration half instead of test pairs")
    parser.add_argument("-o", "--output", type=Path, help="where to write the rows as JSON")
    arguments = parser.parse_args()
    found = []
    print(f"{'criterion':22s} {'heads':>6s} {'mrr':>7s} {'ratio':>6s} {'acc@1':>6s} {'s':>6s}  heads kept by layer")
    for row in rows(arguments.criteria, arguments.heads, arguments.validation):
        found.append(row)
        print(
            f"{row['criterion']:22s} {row['heads']:6.2f} {row['mrr']:7.4f} {row['ratio']:6.3f} {row['accuracy@1']:6.3f} "
            f"{row['seconds']:6.1f}  {' '.join(map(str, row['kept']))}",
            flush=True,
        )
        if arguments.output:
            arguments.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
