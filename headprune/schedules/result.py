"""What a schedule gives back: the model, the plan over all steps, and the history of how it came to be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table
from torch import nn

from headprune.planning import PruningPlan


@dataclass(frozen=True)
class Step:
    """One step of a schedule.

    number: 0 is the model before any cut. target, removed: the fraction of the budget's quantity, of the original's, that was
    to go and that has gone. keep: heads of the original. quality: by the schedule's metric, higher is better; None where none
    is measured. accepted: False for the step that passed the limit and was taken back. seconds: by stage. details: what
    the stages report, JSON values.
    """

    number: int
    target: float
    removed: float
    keep: dict[str, tuple[int, ...]]
    quality: float | None = None
    accepted: bool = True
    seconds: dict[str, float] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def heads(self) -> int:
        return sum(len(heads) for heads in self.keep.values())

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Step:
        return cls(**{**content, "keep": {name: tuple(heads) for name, heads in content["keep"].items()}})


@dataclass(frozen=True)
class ScheduleResult:
    """What a schedule gives back.

    model: the pruned copy; the model that was given is as it was. plan: the heads of that model which are left. history: the
    steps, of which 0 is the model before any cut. stopped: why the schedule ended before its target; None where it was reached.
    folder: where all of it is kept, if anywhere. extras: further models (a lottery ticket's control).
    """

    schedule: str
    model: nn.Module
    plan: PruningPlan
    history: tuple[Step, ...]
    stopped: str | None = None
    folder: Path | None = None
    extras: dict[str, Any] = field(default_factory=dict)

    @property
    def quality(self) -> float | None:
        """Of `model`."""
        return next((step.quality for step in reversed(self.history) if step.accepted), None)

    def __str__(self) -> str:
        end = f"; stopped: {self.stopped}" if self.stopped else ""
        return f"{self.schedule}: {self.plan.removed_heads} of {self.plan.total_heads} query heads went{end}"

    def __rich__(self) -> Table:
        table = Table("step", "to go", "gone", "heads", "quality", "seconds", title=str(self), title_justify="left")
        for step in self.history:
            quality = "" if step.quality is None else f"{step.quality:.4g}"
            number = str(step.number) if step.accepted else f"{step.number}, taken back"
            seconds = f"{sum(step.seconds.values()):.1f}"
            table.add_row(number, f"{step.target:.1%}", f"{step.removed:.1%}", str(step.heads), quality, seconds)
        return table
