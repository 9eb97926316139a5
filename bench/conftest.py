"""The `versus` fixture, which measures a row, and the result file of the run (`--results FILE`)."""

from __future__ import annotations

import datetime
import gc
import json
import os
import tempfile
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from ceilings import ceilings
from machine import machine
from versus import Row, compare

ROWS: list[tuple[str, Row]] = []


def pytest_addoption(parser) -> None:
    parser.addoption("--results", help="where to write the rows (JSON); default bench/results/<machine>-<date>.json")
    parser.addoption(
        "--warm", action="store_true", help="measure nothing: run each function once, so that it is compiled (with -n)"
    )
    parser.addoption("--add", action="store_true", help="keep the rows of other names that the result file has of this machine")


def pytest_collection_modifyitems(items) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish() -> None:
    """What the imports left is looked through no more by each row's collection (versus.measure): a third of a second each."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def versus(request, benchmark):
    """`versus(name, ours, peers, ...)` as `versus.compare`; dtype names the matrix product that the floor is counted by. None where
    nothing is measured (`--warm`).

    The benchmark fixture times ours of the first row once more by itself, so that pytest-benchmark's own files and comparisons
    work too.
    """
    device = "cuda" if request.node.get_closest_marker("gpu") else "cpu"
    rows: list[Row] = []

    def run(name: str, ours, peers, *, dtype: torch.dtype = torch.float32, **options) -> Row | None:
        if request.config.getoption("--warm"):
            with torch.no_grad() if not options.get("grad", False) else torch.enable_grad():
                warm(ours, *peers.values())
            return None
        if options.get("gflop") or options.get("gbyte"):
            options["ceilings"] = ceilings(device, dtype)
        with torch.no_grad() if not options.pop("grad", False) else torch.enable_grad():
            row = compare(name, ours, peers, device=device, **options)
            if not rows:  # the fixture takes one function alone
                benchmark.pedantic(ours, rounds=1)
                benchmark.extra_info.update(asdict(row))
        rows.append(row)
        ROWS.append((device, row))
        keep_rows(request.config.getoption("--results"), request.config.getoption("--add"))
        print(line(row))
        return row

    benchmark.group = request.node.path.stem
    return run


def warm(*functions) -> None:
    for function in functions:
        with suppress(Exception):  # the run that measures says what does not work
            function()


def keep_rows(given: str | None, add: bool) -> None:
    """Writes all rows so far, through a temporary name: a run that is cut short keeps what it measured."""
    found = machine("cuda" if any(device == "cuda" for device, _ in ROWS) else "cpu")
    target = Path(given or Path(__file__).parent / "results" / f"{found['slug']}-{datetime.date.today():%Y-%m-%d}.json")
    rows = [asdict(row) for _, row in ROWS]
    if add and target.exists():
        there = json.loads(target.read_text(encoding="utf-8"))
        names = {row["name"] for row in rows}
        rows = [row for row in there["rows"] if there["machine"] == found and row["name"] not in names] + rows
    document = {"machine": found, "rows": rows}
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, draft = tempfile.mkstemp(dir=target.parent)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(json.dumps(document, indent=1) + "\n")
    os.chmod(draft, 0o644)
    os.replace(draft, target)


def line(row: Row) -> str:
    return f"\n{row.name}: {row.ours_us:.1f} us, {row.peer} {row.peer_us:.1f} us, {row.ratio:.2f}x ({row.goal or 'no goal'})"
