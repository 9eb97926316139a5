"""The report's plots as files for papers: PNG and SVG, from the same numbers as the page."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headprune.errors import InvalidInput
from headprune.files import whole_file
from headprune.report.page_data import Json, page_data
from headprune.report.run_folder import read_run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LOW, HIGH, REMOVED, QUIET = "#e6ecea", "#0a6a58", "#a63a1c", "#5b6663"
CELL, DPI = 0.24, 200  # inches of a head's square; pixels per inch of the PNG
FORMATS = ("png", "svg")
Drawing = Callable[[Json], Iterator[tuple[str, "Figure"]]]  # page_data -> (file name, figure)
_drawings: list[Drawing] = []


def drawing(function: Drawing) -> Drawing:
    """Registers what draws one kind of plot; it gives nothing where the run has no data for it."""
    _drawings.append(function)
    return function


def figures(folder: str | Path, target: str | Path) -> list[Path]:
    """Writes every plot of the report of the run in `folder` to the folder `target`, as NAME.png and NAME.svg; returns the files.

    heads-CRITERION, quality-latency, sensitivity, agreement: those that the run has data for. The same folder gives the same bytes.
    Needs matplotlib; raises InvalidInput without it, and where the folder is no run.
    """
    matplotlib = needed()
    data, written = page_data(read_run(folder)), []
    with matplotlib.rc_context({"font.size": 8, "svg.hashsalt": "headprune", "axes.spines.top": False, "axes.spines.right": False}):
        for draw in _drawings:
            for name, figure in draw(data):
                for kind in FORMATS:
                    path = Path(target) / f"{name}.{kind}"
                    with whole_file(path) as draft:
                        undated = {"Date": None} if kind == "svg" else {}
                        figure.savefig(draft, format=kind, dpi=DPI, bbox_inches="tight", metadata=undated)
                    written.append(path)
    return written


def needed() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise InvalidInput("figures need matplotlib: pip install 'headprune[report]'.") from None
    return matplotlib


def blank(width: float, height: float) -> tuple[Figure, Any]:
    """A figure of its own, apart from pyplot's state, and its axes; inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    return figure, figure.add_subplot()


def colours() -> Any:
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("headprune", [LOW, HIGH]).with_extremes(bad="white")


def cells(axes: Any, rows: list[list[float | None]], labels: list[str], most: float = 1.0) -> Any:
    """Squares, a row for each label; None and what is missing at the end of a row stays white."""
    import numpy

    width = max(map(len, rows))
    values = numpy.full((len(rows), width), numpy.nan)
    for index, row in enumerate(rows):
        values[index, : len(row)] = [numpy.nan if value is None else value for value in row]
    image = axes.pcolormesh(numpy.ma.masked_invalid(values), cmap=colours(), vmin=0.0, vmax=most, edgecolors="white", linewidth=1)
    axes.set_aspect("equal")
    axes.invert_yaxis()
    axes.set_yticks([index + 0.5 for index in range(len(rows))], labels)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return image


@drawing
def head_maps(data: Json) -> Iterator[tuple[str, Figure]]:
    """Percentile of each head by each criterion; a cross on what the plan removes, a line between groups of one key/value head."""
    labels = [site["label"] for site in data["sites"]]
    heads = max(len(site["kv_of_query"]) for site in data["sites"])
    for one in data["criteria"]:
        figure, axes = blank(CELL * heads + 1.2, CELL * len(labels) + 0.6)
        empty: list[list[float | None]] = [[None] * len(site["kv_of_query"]) for site in data["sites"]]
        image = cells(axes, [row or blanks for row, blanks in zip(one["percentile"], empty)], labels)
        for row, (site, bits) in enumerate(zip(data["sites"], data["plan"] or [""] * len(labels))):
            gone = [head + 0.5 for head, bit in enumerate(bits) if bit == "0"]
            axes.plot(gone, [row + 0.5] * len(gone), "X", color=REMOVED, markersize=7, markeredgecolor="white", markeredgewidth=0.7)
            for head in group_starts(site):
                axes.plot([head, head], [row, row + 1], color="black", linewidth=1)
        axes.set_xticks([head + 0.5 for head in range(heads)], range(heads))
        axes.set_xlabel(f"query head ({one['name']}{'; × removed' if data['plan'] else ''})")
        axes.set_ylabel("attention")
        figure.colorbar(image, ax=axes, label="percentile", fraction=0.05, pad=0.03)
        yield f"heads-{one['name'].replace('/', '-')}", figure


def group_starts(site: Json) -> list[int]:
    """Query heads that begin the group of another key/value head, where groups have more than one head."""
    kv = site["kv_of_query"]
    return [] if site["kv_heads"] >= len(kv) else [head for head in range(1, len(kv)) if kv[head] != kv[head - 1]]


@drawing
def quality_latency(data: Json) -> Iterator[tuple[str, Figure]]:
    """Every measured model; the line joins those that no other beats in both."""
    if not data["metrics"] or not data["measured"]:
        return
    headline, higher = data["metrics"]["headline"], data["metrics"]["higher_is_better"]
    points = [one for one in data["measured"] if one["latency_share"] is not None and one["quality"][headline] is not None]
    figure, axes = blank(3.6, 2.6)
    front = sorted((one["latency_share"], one["quality"][headline]) for one in points if not beaten(one, points, headline, higher))
    axes.plot(*zip(*front), "--", color=QUIET, linewidth=1, zorder=1)
    kinds = {
        "sweep": ("o", HIGH, "other budgets", [one for one in points if not one["chosen"] and one["latency_share"] != 1]),
        "dense": ("s", "black", "dense", [one for one in points if not one["chosen"] and one["latency_share"] == 1]),
        "chosen": ("*", REMOVED, "this plan", [one for one in points if one["chosen"]]),
    }
    for marker, colour, label, some in kinds.values():
        if some:
            x, y = zip(*((one["latency_share"], one["quality"][headline]) for one in some))
            axes.scatter(x, y, marker=marker, color=colour, label=label, s=70 if marker == "*" else 28, zorder=2)
    axes.set_xlabel("latency p50, share of dense")
    axes.set_ylabel(f"{headline} ({'higher' if higher else 'lower'} is better)")
    axes.legend(frameon=False)
    yield "quality-latency", figure


def beaten(one: Json, points: list[Json], headline: str, higher: bool) -> bool:
    """Whether another point is at least as good in quality and latency, and better in one of them."""
    sign = 1 if higher else -1

    def place(point: Json) -> tuple[float, float]:
        return -point["latency_share"], sign * point["quality"][headline]

    mine = place(one)
    return any(other != mine and other[0] >= mine[0] and other[1] >= mine[1] for other in map(place, points))


@drawing
def sensitivity(data: Json) -> Iterator[tuple[str, Figure]]:
    """One curve an attention: how much the loss rises with the share of its heads gone."""
    found = data["sensitivity"]
    if found is None:
        return
    figure, axes = blank(3.6, 2.6)
    measured = [(site["label"], curve) for site, curve in zip(data["sites"], found["increase"]) if curve]
    for number, (label, curve) in enumerate(measured):
        shade = colours()(0.25 + 0.75 * number / max(1, len(measured) - 1))
        axes.plot([gone / (len(curve) - 1) for gone in range(len(curve))], curve, color=shade, linewidth=1.2, label=label)
    axes.set_xlabel(f"share of the attention's heads gone (order of {found['criterion']})")
    axes.set_ylabel(f"loss increase ({found['samples']} samples)")
    if len(measured) <= 12:
        axes.legend(frameon=False, ncols=2, fontsize=7, title="attention", title_fontsize=7)
    yield "sensitivity", figure


@drawing
def agreement(data: Json) -> Iterator[tuple[str, Figure]]:
    """Spearman correlation of every pair of criteria."""
    found = data["agreement"]
    if found is None:
        return
    names, count = found["criteria"], len(found["criteria"])
    figure, axes = blank(0.55 * count + 1.6, 0.55 * count + 1.0)
    cells(axes, [[None if value is None else max(0.0, value) for value in row] for row in found["spearman"]], names)
    axes.set_xticks([index + 0.5 for index in range(count)], names, rotation=30, ha="right")
    for row, values in enumerate(found["spearman"]):
        for column, value in enumerate(values):
            ink = "white" if value is not None and value > 0.55 else "black"
            axes.text(column + 0.5, row + 0.5, "" if value is None else f"{value:.2f}", ha="center", va="center", color=ink)
    yield "agreement", figure
