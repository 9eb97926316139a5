"""What was measured: the files of bench/results."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[2] / "bench" / "results"
DATE = re.compile(r"\d{4}-\d\d-\d\d")
OF_QUALITY = ("all-pairs-", "quality-", "quantised-", "recovery-", "rounded-", "schedules-")  # rows of a form of their own


def newest(pattern: str) -> Path:
    """The result file of this pattern with the latest date in its name."""
    return max(RESULTS.glob(pattern), key=lambda path: DATE.search(path.name)[0])


def timings() -> list[dict[str, Any]]:
    """The documents of bench/results that hold timings, oldest first, each with its `file`."""
    paths = [path for path in RESULTS.glob("*.json") if not path.name.startswith(OF_QUALITY)]
    found = sorted(paths, key=lambda path: DATE.search(path.name)[0])
    return [{"file": path.name, **json.loads(path.read_text(encoding="utf-8"))} for path in found]
