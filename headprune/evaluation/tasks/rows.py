"""Data in files of one's own: rows of JSON Lines or of tables with a header, and texts."""

from __future__ import annotations

import csv
import gzip
import io
import random
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

from headprune.errors import InvalidInput
from headprune.evaluation.tasks.other_rows import hub_rows, name_on_hub, parquet_rows
from headprune.files import parsed_json, path_of

Row = dict[str, Any]
Item = TypeVar("Item")
Data = TypeVar("Data")
SEPARATORS = {".csv": ",", ".tsv": "\t"}
ROWS = (".jsonl", ".ndjson", ".json", ".parquet", *SEPARATORS)
TEXTS = (".txt", ".md")
PACKED = (".arrow", ".bz2", ".xz", ".zst", ".zip")  # what data comes in and is not read
TENTH = 10


def read_rows(source: str, columns: Sequence[str] | Callable[[Row], Sequence[str]]) -> list[Row]:
    """The rows of a .jsonl or .ndjson file (an object a line), .json (the same, a list of objects, or an object with one as its
    `data`), .csv or .tsv (with a header), .parquet, or of a data set on the Hub (owner/name:split).

    columns: those that are read, or what tells them from the first row.
    Raises InvalidInput where the file is none of these or cannot be read, and for a row without a value in one of `columns`.
    """
    named = name_on_hub(source)
    rows = file_rows(place_of(source)) if named is None else hub_rows(named)
    if not rows:
        raise InvalidInput(f"{source} holds no rows.")
    if callable(columns):
        columns = columns(rows[0] if isinstance(rows[0], dict) else {})
    for number, row in enumerate(rows, 1):
        refuse_incomplete(row, columns, f"{source}, row {number}")
    return rows


def file_rows(path: Path) -> list[Any]:
    suffix = kind_of(path)
    if suffix not in ROWS:
        raise InvalidInput(f"{path}: rows are read from .jsonl, .json, .csv, .tsv and .parquet files; {way_out(suffix)}.")
    if suffix == ".parquet":
        return parquet_rows(path)
    text = read_text(path)
    try:
        return parsed(suffix, text)
    except (ValueError, csv.Error) as error:
        raise InvalidInput(f"{path} cannot be read as {suffix}: {error}.") from None


def kind_of(path: Path) -> str:
    """What the file's name ends with, in small letters, before a .gz."""
    return Path(path.stem if path.suffix.lower() == ".gz" else path.name).suffix.lower()


def way_out(suffix: str) -> str:
    if suffix == ".arrow":
        return 'with datasets: load_dataset("arrow", data_files=FILE, split="train").to_parquet("rows.parquet")'
    return "unpack it first" if suffix in PACKED else "convert it to one of these"


def refuse_incomplete(row: Any, columns: Sequence[str], place: str) -> None:
    """InvalidInput where `row` is no object, or lacks one of `columns` or a value in it."""
    if not isinstance(row, dict):
        raise InvalidInput(f"{place}: {row!r:.60} is no object; expected one with {', '.join(map(repr, columns))}.")
    if any(row.get(None) or ()):  # where csv puts fields beyond the header's
        raise InvalidInput(f"{place} has more fields than the header; a text with a separator in it must stand in quotes.")
    missing = next((name for name in columns if row.get(name) is None), None)
    if missing is None:
        return
    if missing in row:
        raise InvalidInput(f"{place} has no value for {missing!r}; give one, or leave the row out.")
    there = ", ".join(str(name) for name in row if name is not None)
    raise InvalidInput(f"{place}: no {missing!r}, only {there}. Name the column in the task's options.")


def parsed(suffix: str, text: str) -> list[Any]:
    if suffix in SEPARATORS:
        return table_rows(text, SEPARATORS[suffix])
    if suffix == ".json" and not of_lines(text):
        content = parsed_json(text)
        if isinstance(content, dict) and "data" in content:
            content = content["data"]
        if not isinstance(content, list):
            raise ValueError(f"expected a list of objects, found {type(content).__name__}")
        return content
    # Not splitlines: what Unicode calls a line separator may stand in a string of JSON.
    return [parsed_json(line) for line in text.split("\n") if line.strip()]


def of_lines(text: str) -> bool:
    """Whether the first line of several is an object by itself, as in files of JSON Lines that are called .json."""
    first, _, rest = text.strip().partition("\n")
    try:
        return bool(rest) and isinstance(parsed_json(first), dict)
    except ValueError:
        return False


def table_rows(text: str, separator: str) -> list[Row]:
    limit = csv.field_size_limit(len(text) + 1)  # a document may be longer than the 128 KiB that csv reads otherwise
    try:
        return list(csv.DictReader(io.StringIO(text, newline=""), delimiter=separator))
    finally:
        csv.field_size_limit(limit)


def read_texts(source: str, column: str) -> list[str]:
    """Documents: a .txt or .md file is one, a row of another file or a data set is one (its `column`), a folder holds those of its
    .txt and .md files, in the order of their names, or where it has none, those of its files of rows."""
    path = place_of(source)
    if path.is_dir():
        inside = sorted(file for file in path.rglob("*") if file.is_file())
        files = next((found for kinds in (TEXTS, ROWS) if (found := [file for file in inside if kind_of(file) in kinds])), ())
        if not files:
            raise InvalidInput(f"{path} holds no {', '.join((*TEXTS, *ROWS[:-1]))} or {ROWS[-1]} files.")
        return [text for file in files for text in read_texts(str(file), column)]
    if kind_of(path) in (*ROWS, *PACKED) or name_on_hub(source) is not None:
        return [str(row[column]) for row in read_rows(source, [column])]
    return [read_text(path)]


def read_text(path: Path) -> str:
    """Of a file in UTF-8, packed where it is a .gz, without the mark that some programs put before it."""
    packed = path.suffix.lower() == ".gz"
    try:
        with gzip.open(path, "rt", encoding="utf-8-sig") if packed else path.open(encoding="utf-8-sig") as file:
            return file.read()
    except FileNotFoundError:
        raise InvalidInput(
            f"{path} does not exist (looked for in {Path.cwd()}); expected a file of data, or owner/name:split of the Hub."
        ) from None
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise InvalidInput(f"{path} cannot be read as UTF-8 text: {str(error).rstrip('.')}. Save it as UTF-8.") from None


def place_of(source: str) -> Path:
    """The path of a file or folder of data; ~ is the home folder, as in a recipe no shell has replaced it."""
    return path_of(source).expanduser()


def refuse_same(calibration: str, test: str | None, training: str | None = None, *, nested: bool = False) -> None:
    """InvalidInput where the test data is what heads are scored, or a model is trained, on; nested: or lies in that folder."""
    for name, other in (("calibration", calibration), ("training", training)):
        if test is None or other is None:
            continue
        tested, known = place_of(test).resolve(), place_of(other).resolve()
        if tested == known or (nested and known.is_dir() and tested.is_relative_to(known)):
            raise InvalidInput(
                f"test={test} is {name}={other}, or in it: quality would be measured on what was learnt from. Give other data, or "
                "leave test out to hold out a tenth."
            )


def refuse_counts(**counts: int | None) -> None:
    """InvalidInput where a number of examples is below 1; None is all of them."""
    for name, count in counts.items():
        if count is not None and count < 1:
            raise InvalidInput(f"{name}={count}; expected at least 1.")


@dataclass(frozen=True)
class Parts(Generic[Item]):
    """What a task reads: heads are scored on calibration, a model is recovered on training, quality is measured on test."""

    calibration: list[Item]
    test: list[Item]
    training: list[Item]


def parts_of(
    read: Callable[[str], list[Item]],
    calibration: str,
    test: str | None,
    training: str | None,
    *,
    calibration_count: int,
    test_count: int | None,
    seed: int,
    source: Callable[[Item], Any] | None = None,
) -> Parts[Item]:
    """Of files or folders that `read` reads: at most so many examples for calibration, drawn by `seed`, and for the test, the same
    ones for every seed; those of calibration are for training too where there is no other. source: what examples share that must
    not stand on both sides where a test is held out. Raises InvalidInput as `with_test`."""
    known, held_out = with_test(read, calibration, test, training, partial(without_a_tenth, source=source))
    drawn = shuffled(known, seed)
    tested = held_out if test_count is None or test_count >= len(held_out) else shuffled(held_out)[:test_count]
    return Parts(drawn[:calibration_count], tested, drawn if training is None else shuffled(read(training), seed))


def with_test(
    read: Callable[[str], Data],
    calibration: str,
    test: str | None,
    training: str | None,
    split: Callable[[Data], tuple[Data, Data]],
    *,
    nested: bool = False,
) -> tuple[Data, Data]:
    """(what is learnt from, what is tested on), the latter split off where it has no file. Raises InvalidInput as `refuse_same`."""
    refuse_same(calibration, test, training, nested=nested)
    known = read(calibration)
    return split(known) if test is None else (known, read(test))


def in_batches(items: Sequence[Item], size: int) -> list[Sequence[Item]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def shuffled(items: Sequence[Item], seed: int = 0) -> list[Item]:
    """The same order for the same items and seed, every time."""
    items = list(items)
    random.Random(seed).shuffle(items)
    return items


def without_a_tenth(items: Sequence[Item], source: Callable[[Item], Any] | None = None) -> tuple[list[Item], list[Item]]:
    """(the rest, about a tenth of the items, at least one), the same choice every time. Items of one `source` stay together.
    InvalidInput where there is only one."""
    places: dict[Any, list[int]] = {}
    for place, item in enumerate(items):
        places.setdefault(place if source is None else source(item), []).append(place)
    if len(places) < 2:
        raise InvalidInput(
            "the data is one example, or of one text; a tenth of it cannot be held out as test data. Give test=FILE."
        )
    groups, chosen = list(places.values()), set[int]()
    for number in random.Random(0).sample(range(len(groups)), k=len(groups))[:-1]:
        if len(chosen) >= max(1, len(items) // TENTH):
            break
        chosen.update(groups[number])
    return (
        [item for place, item in enumerate(items) if place not in chosen],
        [item for place, item in enumerate(items) if place in chosen],
    )
