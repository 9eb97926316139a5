"""How far rankings of MiniLM's heads depend on which calibration pairs are drawn, and how many: `python docs/draws.py` writes
docs/pictures/draws.json, which docs/choosing-a-criterion.md shows. A few minutes of one core."""

from pathlib import Path

import headprune as hp
from headprune.evaluation.tasks import build_task
from headprune.files import write_json
from headprune.scoring import get_criterion
from headprune.sources import open_model

TARGET = Path(__file__).parent / "pictures" / "draws.json"
CRITERIA = ("fisher", "gate_gradient", "fisher_least_squares", "least_squares", "wanda", "output_norm", "entropy")
PAIRS, DRAWS, KEEP = (24, 96, 384), 3, 0.5


def main() -> None:
    model, tokenizer = open_model("minilm")
    needs = frozenset().union(*(get_criterion(name).needs for name in CRITERIA))
    rows = []
    for pairs in PAIRS:
        tasks = [build_task("docstring-retrieval", tokenizer, calibration_pairs=pairs, seed=seed) for seed in range(DRAWS)]
        observed = [hp.observe(model, task.calibration, needs, loss_fn=task.loss) for task in tasks]
        for name in CRITERIA:
            found = hp.ranking_stability(observed, name, KEEP)
            rows.append({"criterion": name, "pairs": pairs, "spearman": found.spearman, "overlap": found.overlap})
    write_json(TARGET, "draws", {"model": "minilm", "draws": DRAWS, "keep": KEEP, "rows": rows})


if __name__ == "__main__":
    main()
