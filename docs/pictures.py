"""Measures what the pictures of docs/how-it-works.md show, on MiniLM: `python docs/pictures.py` writes docs/pictures/*.json, from
which the site draws them (docs/generators/figures.py). A few minutes of one core."""

from pathlib import Path

import headprune as hp
from headprune.evaluation.tasks import build_task
from headprune.planning import sensitivity
from headprune.scoring import get_criterion
from headprune.sources import open_model

FOLDER = Path(__file__).parent / "pictures"
CRITERIA = ("fisher_least_squares", "fisher", "magnitude_l2", "wanda", "output_norm", "entropy")
BATCHES = 6  # as the recipe scores


def main() -> None:
    model, tokenizer = open_model("minilm")
    data = build_task("docstring-retrieval", tokenizer)
    batches = data.calibration[:BATCHES]
    needs = frozenset().union(*(get_criterion(name).needs for name in CRITERIA))
    observed = hp.observe(model, batches, needs, loss_fn=data.loss)
    scores = {name: hp.score_observations(observed, name) for name in CRITERIA}
    ranking = scores[CRITERIA[0]]
    for name, found in scores.items():
        found.save(FOLDER / ("scores.json" if found is ranking else f"scores-{name}.json"))
    hp.plan(ranking, hp.Budget(heads=0.5)).save(FOLDER / "plan.json")
    sensitivity(model, batches, ranking, loss_fn=data.loss).save(FOLDER / "sensitivity.json")


if __name__ == "__main__":
    main()
