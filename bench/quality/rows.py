"""The result file: rows that are kept as they are measured, so that a run which is cut off goes on from there."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

KEY = ("model", "method", "heads", "seed")


class Rows:
    """Rows by model, method, fraction and seed; one whose `settings` differ from those asked for counts as missing."""

    def __init__(self, path: Path, machine: dict[str, object]) -> None:
        self.path, self.machine = path, machine
        self._rows: dict[tuple, dict[str, Any]] = {}
        self._fresh: set[tuple] = set()
        if path.exists():
            document = json.loads(path.read_text(encoding="utf-8"))
            self.machine = document["machine"]
            self._rows = {key_of(row): row for row in document["rows"]}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(sorted(self._rows.values(), key=lambda row: (row["model"], row["method"], row["heads"], row["seed"])))

    def find(self, wanted: dict[str, Any]) -> dict[str, Any] | None:
        found = self._rows.get(key_of(wanted))
        return found if found and found["settings"] == wanted["settings"] else None

    def has(self, wanted: dict[str, Any], again: Collection[str] = ()) -> bool:
        """again: methods of which only rows measured since this object was made count."""
        if wanted["method"] in again and key_of(wanted) not in self._fresh:
            return False
        return self.find(wanted) is not None

    def add(self, row: dict[str, Any]) -> None:
        """Writes the file anew, through a temporary name."""
        self._rows[key_of(row)] = row
        self._fresh.add(key_of(row))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        handle, draft = tempfile.mkstemp(dir=self.path.parent)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(json.dumps({"machine": self.machine, "rows": list(self)}, indent=1) + "\n")
        os.chmod(draft, 0o644)
        os.replace(draft, self.path)


def told(rows: Iterable[dict[str, Any]], output: Path | None) -> None:
    """Prints each row as it is measured, and writes all so far to `output`."""
    found = []
    for row in rows:
        found.append(row)
        print(json.dumps(row), flush=True)
        if output:
            output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def key_of(row: dict[str, Any]) -> tuple:
    return tuple(row[name] for name in KEY)
