"""The settings that a folder of work was started with, by which a killed run knows its own again."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path, PurePath
from typing import Any

from headprune.errors import InvalidInput
from headprune.files import read_json, write_json

SETTINGS = "settings.json"


def refuse_other_settings(folder: Path, what: str, settings: Mapping[str, Any]) -> bool:
    """Whether `folder` holds a `what` ("recovery") that was started with these settings, which JSON can hold. InvalidInput where it
    was started with others, or where the folder holds other things; nothing is written."""
    written = folder / SETTINGS
    if not written.exists():
        if folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir()):  # those are half-written
            raise InvalidInput(f"{folder} is not empty and holds no {what}; give another folder.")
        return False
    found, settings = read_json(written, f"{what}_settings"), json.loads(json.dumps(settings))
    other = sorted(name for name in settings if not same_setting(found.get(name), settings[name]))
    if other:
        raise InvalidInput(
            f"{folder} holds a {what} with other settings ({', '.join(other)}: {found.get(other[0])!r} there, "
            f"{settings[other[0]]!r} asked); give another folder, or remove that one."
        )
    return True


def write_settings(folder: Path, what: str, settings: Mapping[str, Any]) -> None:
    write_json(folder / SETTINGS, f"{what}_settings", dict(settings))


def same_setting(one: Any, other: Any) -> bool:
    """Whether both are the same JSON; floats to the rounding of a model that was made again."""
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-4)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same_setting(value, other[name]) for name, value in one.items())
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same_setting, one, other))
    return bool(one == other)


def described(value: Any) -> Any:
    """`value` as JSON, the same in every process, whose sets of names have each another order: functions and other objects by their
    names."""
    if is_dataclass(value) and not isinstance(value, type):
        return {"kind": type(value).__name__, **described(asdict(value))}
    if isinstance(value, Mapping):
        return {str(key): described(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset, range)):
        ordered = sorted(value, key=repr) if isinstance(value, (set, frozenset)) else value
        return [described(item) for item in ordered]
    if isinstance(value, PurePath):
        return str(value)
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    return getattr(value, "__qualname__", type(value).__qualname__)
