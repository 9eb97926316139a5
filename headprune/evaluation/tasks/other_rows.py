"""Rows that other packages read: of Parquet files (pyarrow), and of data sets on the Hub (datasets)."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from huggingface_hub import constants

from headprune.errors import InvalidInput

NAME = re.compile(r"(?P<name>\w[\w.-]*/\w[\w.-]*)(:(?P<config>[^:\[]+))?:(?P<split>[^:\[]+(\[[^\]]*\])?)")


class ClassNumber(int):
    """The number of a class, with the name that the data set gives it: models may number the same names otherwise."""

    name: str

    @classmethod
    def of(cls, value: Any, names: Sequence[str]) -> Any:
        """`value`, or each in a list, with its name; what is none of these numbers as it is."""
        if isinstance(value, list):
            return [cls.of(one, names) for one in value]
        if not isinstance(value, int) or not 0 <= value < len(names):
            return value
        found = cls(value)
        found.name = names[value]
        return found


def with_class_names(rows: list[dict[str, Any]], features: Mapping[str, Any]) -> list[dict[str, Any]]:
    """`rows`, whose classes have the names that `features` of datasets give them, in the form that it writes into files."""
    inside = {column: kind.get("feature", kind) for column, kind in features.items() if isinstance(kind, dict)}  # lists have one
    classes = {column: kind for column, kind in inside.items() if isinstance(kind, dict) and kind.get("_type") == "ClassLabel"}
    for row in rows:
        row.update((column, ClassNumber.of(row[column], kind["names"])) for column, kind in classes.items() if column in row)
    return rows


def name_on_hub(source: str) -> re.Match[str] | None:
    """`source` taken apart where it reads owner/name:split or owner/name:configuration:split and no such file is there. The split
    may be a part of one, in the form of datasets: train[:1000], test[50%:]."""
    found = NAME.fullmatch(source)
    return None if found is None or Path(source).exists() else found


def hub_rows(found: re.Match[str]) -> list[dict[str, Any]]:
    """All rows of a split, from the cache of datasets; fetched first unless HF_HUB_OFFLINE is set."""
    refuse_without("datasets", f"{found[0]} names a data set on the Hub")
    from datasets import load_dataset

    try:
        read = load_dataset(found["name"], found["config"], split=found["split"])
        return with_class_names(list(read), read.features.to_dict())
    except Exception as error:  # whatever it raises on names that are not there, and on data that it cannot read
        reason = " ".join(str(error).split())[:300].rstrip(".")
        way_out = " HF_HUB_OFFLINE=0 lets it be fetched." if constants.HF_HUB_OFFLINE else ""
        raise InvalidInput(f"datasets cannot read {found[0]}: {reason}.{way_out}") from error


def parquet_rows(path: Path) -> list[dict[str, Any]]:
    refuse_without("pyarrow", f"{path} is a Parquet file")
    from pyarrow import parquet

    try:
        table = parquet.read_table(path)
        rows: list[dict[str, Any]] = table.to_pylist()
        written = json.loads((table.schema.metadata or {}).get(b"huggingface", "{}"))  # by datasets
    except FileNotFoundError:
        raise InvalidInput(f"{path} does not exist (looked for in {Path.cwd()}); expected a file of data.") from None
    except (OSError, ValueError) as error:  # pyarrow's are both
        raise InvalidInput(f"{path} cannot be read as Parquet: {str(error).rstrip('.')}.") from None
    return with_class_names(rows, (written.get("info") or {}).get("features") or {})


def refuse_without(package: str, reason: str) -> None:
    if find_spec(package) is None:
        raise InvalidInput(f"{reason}, which {package} reads: pip install 'headprune[data]'.")
