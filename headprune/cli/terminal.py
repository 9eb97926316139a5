"""Where commands print: results to stdout, progress, warnings and errors to stderr."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

Result = TypeVar("Result")
console = Console()
progress_console = Console(stderr=True)


def with_bar(title: str, work: Callable[[Callable[[int, int], None]], Result]) -> Result:
    """What `work` gives, under a progress bar."""
    from headprune.report.progress import Stages

    with Stages(progress_console).stage(title) as progress:
        return work(progress)


def show(as_json: bool, document: Any, *shown: RenderableType) -> None:
    """Prints `document` as one JSON document, or else what is to be shown of it."""
    if as_json:
        console.print_json(data=document)
    for one in () if as_json else shown:
        # A path is neither markup nor to be broken.
        console.print(one, markup=not isinstance(one, str), soft_wrap=isinstance(one, str))


def show_file(as_json: bool, path: Path, *shown: RenderableType) -> None:
    """As `show`, of the JSON file that a command has written."""
    show(as_json, json.loads(path.read_text(encoding="utf-8")), *shown, f"written to {path}")


def rows_of(table: Table) -> list[dict[str, str]]:
    """A table's rows by the heads of its columns, as plain text."""

    def plain(cell: RenderableType) -> str:
        return Text.from_markup(cell).plain if isinstance(cell, str) else str(cell)

    heads = [plain(column.header) for column in table.columns]
    return [dict(zip(heads, map(plain, row))) for row in zip(*(column.cells for column in table.columns))]
