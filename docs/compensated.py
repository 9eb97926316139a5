"""How good MiniLM is with half of its heads gone by each of some criteria, with and without compensation.

`python docs/compensated.py` writes docs/pictures/compensated.json, for docs/choosing-a-criterion.md. On validation pairs: the
test pairs are not read. Rows are kept as they are measured; called again it goes on. Half an hour of one core.
"""

import copy
from pathlib import Path

import headprune as hp
from headprune.evaluation.tasks import build_task
from headprune.files import read_json, write_json
from headprune.scoring import get_criterion
from headprune.sources import open_model

TARGET = Path(__file__).parent / "pictures" / "compensated.json"
CRITERIA = ("fisher_least_squares", "fisher", "gate_gradient", "wanda", "magnitude_l2", "random", "least_squares", "entropy")
CUT, COMPENSATED, EVENLY = ("global", False), ("global", True), ("uniform", True)  # (allocation, compensation)
WAYS = {name: (CUT, COMPENSATED, EVENLY) if "fisher" in name else (CUT, COMPENSATED) for name in CRITERIA}
HEADS = 0.5


def main() -> None:
    model, tokenizer = open_model("minilm")
    task = build_task("docstring-retrieval", tokenizer, validation=True)
    rows = read_json(TARGET, "compensated")["rows"] if TARGET.exists() else []
    dense = task.examples(model)["mrr"].value
    needs = frozenset().union(*(get_criterion(name).needs for name in CRITERIA))
    observed = hp.observe(model, task.calibration, needs, loss_fn=task.loss)
    for name in CRITERIA:
        scores = hp.score_observations(observed, name)
        for allocation, compensated in WAYS[name]:
            row = {"criterion": name, "allocation": allocation, "compensated": compensated}
            if any(row.items() <= one.items() for one in rows):
                continue
            pruned = copy.deepcopy(model)
            plan = hp.plan(scores, hp.Budget(heads=HEADS), allocation=allocation)
            hp.prune(pruned, plan, task.calibration if compensated else None, forward=task.forward)
            rows.append(row | {"of_dense": task.examples(pruned)["mrr"].value / dense})
            write_json(
                TARGET, "compensated", {"model": "minilm", "heads": HEADS, "pairs": len(task.test), "dense": dense, "rows": rows}
            )


if __name__ == "__main__":
    main()
