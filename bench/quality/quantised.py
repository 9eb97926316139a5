"""How heads rank when the weights that are scored have 8 or 4 bits, and the quality of the model itself pruned by that.

    python bench/quality/quantised.py minilm -o bench/results/quantised-minilm-MACHINE-DATE.json

Fisher scores, half of the heads by global ranking, outputs re-solved; three calibration draws. "same": the share of the heads
that stay which stay too by the scores of the weights as they are.
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
from headprune.evaluation.tasks import build_task
from headprune.sources import EMBEDDED, open_model

BITS = (None, 8, 4)


def rows(name: str, draws: int, fraction: float) -> Iterator[dict[str, Any]]:
    for draw in range(draws):
        dense, tokenizer = open_model(name)
        task = build_task(EMBEDDED[name].task, tokenizer, seed=draw)
        original, kept, reference = task.evaluate(dense)[task.headline], None, None
        for bits in BITS:
            scored = dense if bits is None else open_model(name, bits=bits)[0]
            scores = hp.score(scored, task.calibration, "fisher", loss_fn=task.loss)
            plan = hp.plan(scores, hp.Budget(heads=fraction))
            heads = {(site, head) for site, some in plan.items() for head in some}
            kept, reference = kept or heads, reference or scores
            pruned = copy.deepcopy(dense)
            hp.prune(pruned, plan, task.calibration, forward=task.forward)
            ratio = task.evaluate(pruned)[task.headline] / original
            yield {
                "model": name, "draw": draw, "bits": bits or "as it is", "heads": fraction, "metric": task.headline, "ratio": ratio,
                "spearman": float(reference.compare(scores).spearman), "same": len(heads & kept) / len(kept),
            }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=EMBEDDED)
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--heads", type=float, default=0.5, help="fraction to remove")
    parser.add_argument("-o", "--output", type=Path, help="where to write the rows as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    told(rows(arguments.model, arguments.draws, arguments.heads), arguments.output)


if __name__ == "__main__":
    main()
