"""The pictures of the pages, drawn by headprune's own report from docs/pictures/*.json (docs/pictures.py) and bench/results."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from headprune.report.figures import HIGH, QUIET, REMOVED, blank, figures, needed

from .quality import measured

MEASURED = Path(__file__).parents[1] / "pictures"
TAKEN = {"heads-fisher_least_squares": "plan", "agreement": "agreement", "sensitivity": "sensitivity"}  # of the run with its plan
LABELLED = {"ours": REMOVED, "kwon": HIGH, "fisher": "black"}  # the others are grey


def pictures() -> dict[str, bytes]:
    """File name -> SVG."""
    with tempfile.TemporaryDirectory() as folder, needed().rc_context({"svg.fonttype": "none"}):
        run, scored, drawn = (Path(folder) / name for name in ("run", "scored", "drawn"))
        shutil.copytree(MEASURED, run)
        scored.mkdir()
        shutil.copy(MEASURED / "scores-fisher.json", scored / "scores.json")
        figures(run, drawn)
        found = {f"{name}.svg": (drawn / f"{source}.svg").read_bytes() for source, name in TAKEN.items()}
        figures(scored, drawn)
        found["scores.svg"] = (drawn / "heads-fisher.svg").read_bytes()
        for model, fractions in measured().items():
            found[f"quality-{model}.svg"] = quality(model, fractions, Path(folder) / "quality.svg")
    return found


def quality(model: str, fractions: dict, path: Path) -> bytes:
    """Quality over the share of heads removed: a line for each method."""
    figure, axes = blank(4.2, 3.0)
    shares = [float(fraction) for fraction in fractions]
    names = sorted({name for one in fractions.values() for name in one["methods"]}, key=lambda name: name in LABELLED)
    for name in names:
        cells = [one["methods"].get(name, {}) for one in fractions.values()]
        points = [(share, cell["mean"]) for share, cell in zip(shares, cells) if "mean" in cell]
        shown = {"color": LABELLED[name], "label": name} if name in LABELLED else {"color": QUIET, "alpha": 0.35}
        axes.plot(*zip(*points), marker=".", linewidth=1.2, **shown)
    axes.set_xlabel(f"share of {model}'s heads removed, no training")
    axes.set_ylabel("quality metric, share of the dense model's")
    axes.legend(frameon=False)
    figure.savefig(path, format="svg", bbox_inches="tight", metadata={"Date": None})
    return path.read_bytes()
