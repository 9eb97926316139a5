"""The report of a run: one HTML file that needs no network and no server."""

from __future__ import annotations

import json
from importlib.resources import files
from math import isnan
from pathlib import Path
from typing import Any

import yaml

from headprune.arguments import check_arguments
from headprune.files import write_text
from headprune.report.page_data import page_data
from headprune.report.run_folder import RunFolder, read_run
from headprune.report.tables import check_rows
from headprune.version import __version__

SCRIPTS = ("logic.js", "grid.js", "charts.js", "selection.js", "main.js")


def report(folder: str | Path, output: str | Path | None = None) -> Path:
    """Writes the report of the run in `folder` and returns where: `output`, or report.html in the folder.

    The page shows a heat map for every scores*.json, the plan with a slider over budgets, and whatever else the folder has:
    result.json, checks.json, sweep.json, sensitivity.json, portraits.json, the recipe and the log. Heads can be kept or dropped in
    it and the plan downloaded. Raises InvalidInput where the folder holds neither scores nor a plan, or values of different models.
    """
    check_arguments(report, locals())
    run = read_run(folder)
    target = Path(output) if output is not None else run.folder / "report.html"
    write_text(target, page(run))
    return target


def page(run: RunFolder) -> str:
    """The HTML text."""
    import jinja2

    parts = files("headprune.report") / "page"
    data = page_data(run)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    heads = sum(shape.head_map.query_heads for shape in run.shapes.values())
    return environment.from_string((parts / "page.html.j2").read_text(encoding="utf-8")).render(
        data=data, plan=run.plan, heads=heads, kept=None if run.plan is None else heads - run.plan.removed_heads,
        grouped=any(site["kv_heads"] < len(site["kv_of_query"]) for site in data["sites"]), tiles=tiles(run),
        columns=run.comparison.columns() if run.comparison else (),
        rows=run.comparison.rows() if run.comparison else [],
        machine=run.comparison.dense.machine if run.comparison else None, checks=check_rows(run.checks),
        recipe=yaml.safe_dump(run.recipe, sort_keys=False) if run.recipe else "", log=run.log, version=__version__,
        style=(parts / "page.css").read_text(encoding="utf-8"), json=embedded(data),
        script="\n".join((parts / name).read_text(encoding="utf-8") for name in SCRIPTS),
    )  # fmt: skip


def tiles(run: RunFolder) -> list[tuple[str, str, str]]:
    """What a reader wants first: (name, value, note)."""
    found = run.comparison
    if found is None:
        return []
    better = "higher" if found.higher_is_better else "lower"
    quality = (f"{one.quality[found.headline]:.4g}" for one in (found.dense, found.pruned))
    fields = {"parameters": "parameters", "latency_p50_ms": "latency p50", "kv_cache_bytes_per_token": "key/value cache"}
    shares = [
        (label, f"{100 * found.ratio(field):.1f} %", "of dense") for field, label in fields.items() if not isnan(found.ratio(field))
    ]
    note = f"{better} is better; {found.dense.data()}" if found.dense.data() else f"{better} is better"
    return [(found.headline, " → ".join(quality), note), *shares]


def embedded(data: dict[str, Any]) -> str:
    """JSON that may stand in a script element: no "<" could end it early."""
    return json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
