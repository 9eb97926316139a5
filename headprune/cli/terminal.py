"""Where commands print: results to stdout, progress, warnings and errors to stderr."""

from __future__ import annotations

import io
import json
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from headprune.files import finite

Result = TypeVar("Result")
console = Console()
progress_console = Console(stderr=True)


class LogLines(logging.Handler):
    """Shows what headprune logs above the progress: warnings, or with level INFO everything and when."""

    def emit(self, record: logging.LogRecord) -> None:
        time = "" if self.level > logging.INFO else f"{logging.Formatter().formatTime(record)} "
        style = "yellow" if record.levelno >= logging.WARNING else "dim"
        lines = [f"{time}{record.getMessage()}"]
        if record.exc_info:
            lines.append(logging.Formatter().formatException(record.exc_info))
        progress_console.print(Text("\n".join(lines), style), soft_wrap=True)


def take_every_character() -> None:
    """Prints \\u25a0 where the encoding of stdout does not have ■, as stderr does, in place of an error when all work is done."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


@contextmanager
def log_shown() -> Iterator[LogLines]:
    """In the block warnings are shown; whoever wants more lowers the handler's level."""
    logger, handler = logging.getLogger("headprune"), LogLines(logging.WARNING)
    level = logger.level
    logger.addHandler(handler)
    try:
        yield handler
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def with_bar(title: str, work: Callable[[Callable[[int, int], None]], Result]) -> Result:
    """What `work` gives, under a progress bar."""
    from headprune.report.progress import Stages

    with Stages(progress_console).stage(title) as progress:
        return work(progress)


def show(as_json: bool, document: Any, *shown: RenderableType) -> None:
    """Prints `document` as one JSON document, or else what is to be shown of it."""
    if as_json:
        console.print_json(data=finite(document), ensure_ascii=not console.encoding.startswith("utf"))
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
