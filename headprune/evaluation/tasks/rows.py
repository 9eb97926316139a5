"""Data in files of one's own: rows of JSON Lines or of tables with a header, and texts."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from headprune.errors import InvalidInput
from headprune.files import path_of

Row = dict[str, Any]
Item = TypeVar("Item")
SEPARATORS = {".csv": ",", ".tsv": "\t"}
TEXTS = (".txt", ".md")
TENTH = 10


def read_rows(source: str, columns: Sequence[str]) -> list[Row]:
    """The rows of a .jsonl file (an object a line), .json (a list of objects), .csv or .tsv (with a header).

    Raises InvalidInput where the file is none of these or cannot be read, and for a row without one of `columns`.
    """
    path = path_of(source)
    if path.suffix not in (".jsonl", ".json", *SEPARATORS):
        raise InvalidInput(f"{path}: rows are read from .jsonl, .json, .csv and .tsv files; convert it to one of these.")
    text = read_text(path)
    try:
        rows = parsed(path.suffix, text)
    except (ValueError, csv.Error) as error:
        raise InvalidInput(f"{path} cannot be read as {path.suffix}: {error}.") from None
    for number, row in enumerate(rows, 1):
        missing = [name for name in columns if not isinstance(row, dict) or row.get(name) is None]
        if missing:
            there = ", ".join(map(str, row)) if isinstance(row, dict) else repr(row)[:60]
            raise InvalidInput(f"{path}, row {number}: no {missing[0]!r}, only {there}. Name the column in the task's options.")
    if not rows:
        raise InvalidInput(f"{path} holds no rows.")
    return rows


def parsed(suffix: str, text: str) -> list[Any]:
    if suffix in SEPARATORS:
        return list(csv.DictReader(text.splitlines(keepends=True), delimiter=SEPARATORS[suffix]))
    if suffix == ".json":
        content = json.loads(text)
        if not isinstance(content, list):
            raise ValueError(f"expected a list of objects, found {type(content).__name__}")
        return content
    return [json.loads(line) for line in text.splitlines() if line.strip()]


def read_texts(source: str, column: str) -> list[str]:
    """Documents: a .txt or .md file is one, a row of another file is one (its `column`), a folder holds those of its .txt and .md
    files, in the order of their names."""
    path = path_of(source)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in TEXTS)
        if not files:
            raise InvalidInput(f"{path} holds no {' or '.join(TEXTS)} files.")
        return [read_text(file) for file in files]
    if path.suffix in (".jsonl", ".json", *SEPARATORS):
        return [str(row[column]) for row in read_rows(source, [column])]
    return [read_text(path)]


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InvalidInput(f"{path} does not exist (looked for in {Path.cwd()}); expected a file of data.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"{path} cannot be read as UTF-8 text: {error}.") from None


def without_a_tenth(items: Sequence[Item]) -> tuple[list[Item], list[Item]]:
    """(the rest, a tenth of the items, at least one), the same choice every time. InvalidInput for a single item."""
    if len(items) < 2:
        raise InvalidInput("the data is one example; a tenth of it cannot be held out as test data. Give test=FILE.")
    order = random.Random(0).sample(range(len(items)), k=len(items))
    chosen = set(order[: max(1, len(items) // TENTH)])
    return (
        [item for place, item in enumerate(items) if place not in chosen],
        [item for place, item in enumerate(items) if place in chosen],
    )
