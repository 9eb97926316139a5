"""Rows that other packages read: of Parquet files (pyarrow), and of data sets on the Hub (datasets)."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from huggingface_hub import constants

from headprune.errors import InvalidInput

NAME = re.compile(r"(?P<name>\w[\w.-]*/\w[\w.-]*)(:(?P<config>[^:\[]+))?:(?P<split>[^:\[]+(\[[^\]]*\])?)")


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
        return list(load_dataset(found["name"], found["config"], split=found["split"]))
    except Exception as error:  # whatever it raises on names that are not there, and on data that it cannot read
        reason = " ".join(str(error).split())[:300].rstrip(".")
        way_out = " HF_HUB_OFFLINE=0 lets it be fetched." if constants.HF_HUB_OFFLINE else ""
        raise InvalidInput(f"datasets cannot read {found[0]}: {reason}.{way_out}") from error


def parquet_rows(path: Path) -> list[dict[str, Any]]:
    refuse_without("pyarrow", f"{path} is a Parquet file")
    from pyarrow import parquet

    try:
        rows: list[dict[str, Any]] = parquet.read_table(path).to_pylist()
    except FileNotFoundError:
        raise InvalidInput(f"{path} does not exist (looked for in {Path.cwd()}); expected a file of data.") from None
    except (OSError, ValueError) as error:  # pyarrow's are both
        raise InvalidInput(f"{path} cannot be read as Parquet: {str(error).rstrip('.')}.") from None
    return rows


def refuse_without(package: str, reason: str) -> None:
    if find_spec(package) is None:
        raise InvalidInput(f"{reason}, which {package} reads: pip install 'headprune[data]'.")
