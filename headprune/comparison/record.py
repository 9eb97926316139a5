"""The folder of a comparison: its settings, the plan, and one file for each method that is done.

settings.json   what was compared and how; another comparison's folder is refused
plan.json       the heads that stay
<method>.json   a row
<method>/       what a killed fine-tune goes on from
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from headprune.comparison.row import MethodRow
from headprune.errors import InvalidInput
from headprune.files import read_json, write_json
from headprune.planning import PruningPlan
from headprune.recovery.result import same_setting

log = logging.getLogger("headprune")
SETTINGS, PLAN, KIND = "settings.json", "plan.json", "compared_method"


class ComparisonFolder:
    """Rows that are kept as they are measured. folder: None keeps nothing.

    Raises InvalidInput where the folder holds something else.
    """

    def __init__(self, folder: str | Path | None, settings: Mapping[str, Any]) -> None:
        self.folder = None if folder is None else Path(folder)
        if self.folder is not None:
            self._take_up(self.folder, json.loads(json.dumps(settings)))

    def plan(self, make: Callable[[], PruningPlan]) -> PruningPlan:
        """The plan that an earlier try chose, else `make` chooses it now."""
        if self.folder is not None and (self.folder / PLAN).exists():
            return PruningPlan.load(self.folder / PLAN)
        plan = make()
        if self.folder is not None:
            plan.save(self.folder / PLAN)
        return plan

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

    def _take_up(self, folder: Path, settings: dict[str, Any]) -> None:
        written = folder / SETTINGS
        if not written.exists():
            if folder.exists() and any(folder.iterdir()):
                raise InvalidInput(f"{folder} is not empty and holds no comparison; give another folder.")
            write_json(written, "comparison_settings", settings)
            return
        found = read_json(written, "comparison_settings")
        other = sorted(name for name in settings if not same_setting(found.get(name), settings[name]))
        if other:
            raise InvalidInput(
                f"{self.folder} holds a comparison with other settings ({', '.join(other)}: {found.get(other[0])!r} there, "
                f"{settings[other[0]]!r} asked); give another folder, or remove that one."
            )
        log.info("taking up %s", self.folder)
