"""The folder of a comparison: its settings, the plan, and one file for each method that is done.

settings.json   what was compared and how; another comparison's folder is refused
plan.json       the heads that stay
<method>.json   a row
<method>/       what a killed fine-tune goes on from
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from headprune.comparison.row import MethodRow
from headprune.errors import InvalidInput
from headprune.files import read_json, write_json
from headprune.planning import PruningPlan
from headprune.settings import refuse_other_settings, write_settings

log = logging.getLogger("headprune")
WHAT, PLAN, KIND = "comparison", "plan.json", "compared_method"


class ComparisonFolder:
    """Rows that are kept as they are measured. folder: None keeps nothing.

    Raises InvalidInput where the folder holds something else; nothing is written before `start`.
    """

    def __init__(self, folder: str | Path | None, settings: Mapping[str, Any]) -> None:
        self.folder, self.settings = None if folder is None else Path(folder), settings
        self.earlier: PruningPlan | None = None  # what an earlier try of the same comparison chose
        if self.folder is not None and refuse_other_settings(self.folder, WHAT, settings):
            log.info("taking up %s", self.folder)
            self.earlier = PruningPlan.load(self.folder / PLAN) if (self.folder / PLAN).exists() else None

    def start(self, plan: PruningPlan) -> None:
        if self.folder is not None and self.earlier is None:
            write_settings(self.folder, WHAT, self.settings)
            plan.save(self.folder / PLAN)

    def row(self, method: str) -> MethodRow | None:
        """What was measured of `method` before; None where it is still to be done."""
        path = None if self.folder is None else self.folder / f"{method}.json"
        if path is None or not path.exists():
            return None
        content = {name: value for name, value in read_json(path, KIND).items() if name not in ("kind", "schema_version")}
        try:
            return MethodRow.from_json(content["row"])
        except (KeyError, TypeError) as error:
            raise InvalidInput(f"{path} is not a complete row ({error!r}); remove it, and it is measured again.") from None

    def add(self, row: MethodRow) -> None:
        """Keeps a row, and nothing that was only for going on. One that was refused is tried again next time."""
        if self.folder is not None and row.refused is None:
            write_json(self.folder / f"{row.method}.json", KIND, {"row": asdict(row)})
            shutil.rmtree(self.folder / row.method, ignore_errors=True)

    def tuning(self, method: str) -> Path | None:
        """Where the fine-tune of a method keeps what it needs to go on."""
        return None if self.folder is None else self.folder / method
