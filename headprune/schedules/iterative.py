"""Pruning in steps, with recovery after each; one shot is the schedule of a single step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from headprune.arguments import check_arguments
from headprune.errors import InvalidInput
from headprune.planning import Budget
from headprune.schedules.quality import drop
from headprune.schedules.record import Record
from headprune.schedules.result import ScheduleResult
from headprune.schedules.schedule import failing, finished, measure_dense, schedule
from headprune.schedules.setting import Setting, check_limit
from headprune.schedules.spacing import check_spread, targets
from headprune.schedules.step import Clock, carry_out, plan_of


@schedule("one_shot")
def one_shot(model: nn.Module, batches: Any, budget: Budget, *, folder: str | Path | None = None, **options: Any) -> ScheduleResult:
    """The whole budget at once: score, plan, cut, recover.

    Args:
        model: stays as it is; a copy is pruned.
        batches: what scores, compensation and (without `train`) recovery read; a list, or anything to be read once.
        folder: where steps, history, the plan and the model are kept; a killed schedule goes on from there.
        options: headprune.schedules.setting.Setting: criterion, loss_fn, train, recover, metric, seed, progress, ..., and those
            of `hp.plan` (allocation, min_heads, ...).

    Raises InfeasibleBudget or InvalidInput before anything is done; ScheduleFailed where a loss or score is not finite.
    """
    check_arguments(one_shot, locals())
    return stepwise("one_shot", Setting.of(model, batches, budget, options), [budget.fraction], None, folder)


def check_iterative(steps: int | None, per_step: float | None, spacing: str, max_drop: float | None) -> None:
    check_spread(steps, per_step, spacing)
    if max_drop is not None and max_drop < 0:
        raise InvalidInput(f"max_drop is {max_drop}; expected the share of the quality that may be lost, 0 or more (0.02).")


@schedule("iterative", check_iterative)
def iterative(
    model: nn.Module,
    batches: Any,
    budget: Budget,
    *,
    steps: int | None = None,
    per_step: float | None = None,
    spacing: str = "linear",
    max_drop: float | None = None,
    folder: str | Path | None = None,
    **options: Any,
) -> ScheduleResult:
    """Prunes a little, recovers, scores what is left anew, and so on until the budget is met.

    Args:
        steps: how many, default 4; or per_step: the fraction of the original's that goes at each step.
        spacing: of `steps`: "linear", "cubic" (Zhu & Gupta 2017) or "geometric".
        max_drop: the share of the dense model's quality that may be lost: the first step that loses more is taken back, and
            the schedule ends with the model before it.

    The rest is as in `one_shot`.
    """
    check_arguments(iterative, locals())
    check_iterative(steps, per_step, spacing, max_drop)
    setting = Setting.of(model, batches, budget, options)
    check_limit(setting, max_drop)
    goals = targets(budget.fraction, steps, per_step, spacing)
    return stepwise("iterative", setting, goals, max_drop, folder)


def stepwise(name: str, setting: Setting, goals: list[float], max_drop: float | None, folder: str | Path | None) -> ScheduleResult:
    setting.refuse_unscorable()
    record = Record(setting.dense, folder, name, {**setting.to_json(), "targets": goals, "max_drop": max_drop})
    measure_dense(setting, record, name)
    model = record.restore()
    for number in range(record.steps[-1].number + 1, len(goals) + 1):
        if record.stopped:
            break
        clock = Clock(f"step {number} of {len(goals)}", setting.progress)
        with failing(setting, record, name, clock):
            work = record.recovery_folder(number)
            step = carry_out(setting, model, record.present.keep, number, goals[number - 1], clock, work, len(goals))
        dense = record.steps[0].quality
        lost = 0.0 if dense is None or step.quality is None else drop(dense, step.quality)
        if max_drop is not None and lost > max_drop:
            record.reject(step, f"step {number} lost {lost:.1%} of the quality, {max_drop:.1%} allowed")
            model = record.restore()
            break
        record.accept(step, model, plan_of(setting, step.keep))
    return finished(setting, record, name, model)
