"""How good pruned models are: the newest rows of bench/quality, and how far rankings depend on the calibration data."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from .registry import generator, plain, table
from .results import newest

sys.path.append(str(Path(__file__).parents[2] / "bench"))  # where the methods are defined
from quality import published, torch_pruning_heads  # noqa: F401 (they register their methods)
from quality.methods import methods

PICTURES = Path(__file__).parents[1] / "pictures"
DRAWS = PICTURES / "draws.json"


def measured() -> dict[str, dict]:
    """Model -> fraction of the heads -> the summary of each method."""
    return json.loads(newest("quality-*.summary.json").read_text(encoding="utf-8"))


@generator("quality")
def quality() -> str:
    """The table that `make quality` writes."""
    return written("quality-*.md")


@generator("quality-all-pairs")
def quality_on_all_pairs() -> str:
    """The table of `bench/quality/compare.py --all-pairs`."""
    return written("all-pairs-*.md")


def written(pattern: str) -> str:
    path = newest(pattern)
    return f"From `bench/results/{path.name}`:\n\n{path.read_text(encoding='utf-8').strip()}"


@generator("quality-forms")
def forms() -> str:
    """What each method of the table is."""
    shown = {name for found in measured().values() for one in found.values() for name in one["methods"]}
    rows = [[plain(method.label), plain(method.form)] for name, method in methods().items() if name in shown]
    return table(["method", "what was run"], rows)


@generator("draws")
def draws() -> str:
    """Agreement of rankings from different draws of calibration pairs, by criterion and number of pairs."""
    found = json.loads(DRAWS.read_text(encoding="utf-8"))
    by_criterion: dict[str, dict[int, dict]] = {}
    for row in found["rows"]:
        by_criterion.setdefault(row["criterion"], {})[row["pairs"]] = row
    pairs = sorted({row["pairs"] for row in found["rows"]})
    rows = [
        [f"`{name}`", *(f"{cells[count]['spearman']:.2f}, {cells[count]['overlap']:.0%}" for count in pairs)]
        for name, cells in by_criterion.items()
    ]
    return table(["criterion", *(f"{count} pairs" for count in pairs)], rows, right=len(pairs))
