"""The registry of schedules, and what they have in common: a first measurement, an end, and an error that says where."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ParamSpec

from torch import nn

from headprune.errors import HeadpruneError, unknown_name
from headprune.schedules.composition import whole
from headprune.schedules.record import Record
from headprune.schedules.result import ScheduleResult
from headprune.schedules.setting import Setting
from headprune.schedules.step import Clock, described_step, measured, plan_of
from headprune.surgery import save

# A loop around score -> plan -> prune -> recover: schedule(model, batches, budget, **options of its own and of Setting). `model`
# stays as it is; a copy is pruned.
P = ParamSpec("P")
NOT_IN_RECIPES = ("folder", "recover", "distil", "initialise")  # a run gives them, or no file can
_schedules: dict[str, Callable[..., ScheduleResult]] = {}
_checks: dict[str, Callable[..., None]] = {}


def schedule(
    name: str, check: Callable[..., None] | None = None
) -> Callable[[Callable[P, ScheduleResult]], Callable[P, ScheduleResult]]:
    """Registers a schedule under `name`. check: raises InvalidInput for values that its own options of these names cannot have."""

    def register(function: Callable[P, ScheduleResult]) -> Callable[P, ScheduleResult]:
        _schedules[name] = function
        if check is not None:
            _checks[name] = check
        return function

    return register


def get_schedule(name: str) -> Callable[..., ScheduleResult]:
    """The schedule of this name. Raises InvalidInput where there is none."""
    if name not in _schedules:
        raise unknown_name("schedule", name, _schedules)
    return _schedules[name]


def schedules() -> dict[str, Callable[..., ScheduleResult]]:
    """Every schedule by name."""
    return dict(_schedules)


def recipe_options(name: str) -> list[str]:
    """The options of the schedule `name` that belong to it alone and can stand in a file."""
    parameters = inspect.signature(get_schedule(name)).parameters.items()
    own = [key for key, found in parameters if found.kind is found.KEYWORD_ONLY]
    return [key for key in own if key not in NOT_IN_RECIPES]


def check_schedule(name: str, options: Mapping[str, Any]) -> None:
    """InvalidInput for a value among `options` that the schedule `name` would refuse, before there is a model."""
    check = _checks.get(name)
    if check is not None:
        defaults = {key: found.default for key, found in inspect.signature(get_schedule(name)).parameters.items()}
        check(**{key: {**defaults, **options}[key] for key in inspect.signature(check).parameters})


class ScheduleFailed(HeadpruneError):
    """A step that failed (a NaN loss, most of all). last_good: the ScheduleResult after the step before it."""

    def __init__(self, message: str, last_good: ScheduleResult) -> None:
        super().__init__(message)
        self.last_good = last_good


@contextmanager
def failing(setting: Setting, record: Record, name: str, clock: Clock) -> Iterator[None]:
    """Turns an error inside the block into ScheduleFailed, which says in which step and stage, and what is kept."""
    try:
        yield
    except ScheduleFailed:
        raise
    except HeadpruneError as error:
        good = 0 if record.last is None else record.last.number
        kept = "in last_good of this error" if record.folder is None else f"in {record.folder}, where the same call goes on"
        raise ScheduleFailed(
            f"{name} failed in {clock.label}, {clock.stage or 'start'}: {error} The state after step {good} is kept {kept}.",
            result_of(setting, record, name, record.restore()),
        ) from error


def measure_dense(setting: Setting, record: Record, name: str) -> None:
    """Step 0: the quality of the dense model, unless the record has it."""
    if record.steps:
        return
    clock = Clock("dense", setting.progress)
    with failing(setting, record, name, clock):
        keep = whole(record.shapes)
        quality = measured(setting, setting.dense, clock)
        record.accept(described_step(setting, 0, 0.0, keep, quality, clock), setting.dense, plan_of(setting, keep))


def result_of(setting: Setting, record: Record, name: str, model: nn.Module, **extras: Any) -> ScheduleResult:
    keep = record.last.keep if record.last else whole(record.shapes)
    chosen = plan_of(setting, keep)
    return ScheduleResult(name, model, chosen, tuple(record.steps), record.stopped, record.folder, extras)


def finished(setting: Setting, record: Record, name: str, model: nn.Module, **extras: Any) -> ScheduleResult:
    """The result; with a folder also its model in `model/` (for `hp.load`) and its plan in `plan.json`."""
    result = result_of(setting, record, name, model.eval(), **extras)
    if record.folder is not None and not (record.folder / "model").exists():
        result.plan.save(record.folder / "plan.json")
        save(model, record.folder / "model")
    return result
