"""A run whose recipe names a schedule: the loop takes the place of plan, cut and recovery."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from headprune.errors import InvalidInput
from headprune.evaluation.tasks import Task
from headprune.planning import Budget, PruningPlan
from headprune.recipe import Recipe, RecoverSection
from headprune.report.progress import Stages
from headprune.run_recovery import as_asked
from headprune.run_values import loaded_beside, planning_options
from headprune.schedules import RecoverySettings, check_schedule, get_schedule
from headprune.schedules.quality import mean_loss
from headprune.schedules.setting import ShowProgress
from headprune.surgery import save
from headprune.surgery.companions import origin_of
from headprune.surgery.verify import relative_difference

log = logging.getLogger("headprune")
HELD_OUT_EVERY = 5  # each fifth calibration batch measures the quality that a limit is set on


def scheduled_model(
    dense: PreTrainedModel, task: Task, recipe: Recipe, folder: Path, stages: Stages
) -> tuple[PruningPlan, PreTrainedModel, dict[str, Any]]:
    """The plan in the dense model's heads, the pruned model as it loads from disk, and what was checked when it was saved. A killed
    schedule goes on in `folder`/schedule."""
    section = recipe.schedule
    if section is None:
        raise InvalidInput("the recipe names no schedule; give schedule.name.")
    batches, held_out = calibration(task, limited="max_drop" in section.options)
    with shown(stages) as progress:
        result = get_schedule(section.name)(
            dense,
            batches,
            Budget.of(recipe.plan.budget),
            loss_fn=task.loss,
            forward=task.readout,
            criterion=recipe.score.criterion,
            normalize=recipe.score.normalize,
            compensate=recipe.prune.compensate,
            feed_forward=recipe.prune.feed_forward,
            trials=recipe.plan.trials,
            recover=recovery_settings(recipe.recover, recipe.device),
            train=task.training(),
            metric=lambda model: -mean_loss(model, held_out, task.loss),
            folder=folder / "schedule",
            seed=recipe.seed,
            progress=progress,
            **planning_options(recipe),
            **section.options,
        )
    log.info("%s", result)
    result.plan.save(folder / "plan.json")
    target = folder / "model"
    with stages.stage("save and load back"):
        expected = task.outputs(result.model)
        save(result.model, target, source=origin_of(dense))
        loaded = loaded_beside(dense, target)
    return result.plan, loaded, {"reload": relative_difference(task.outputs(loaded), expected)}


def refuse_schedule(recipe: Recipe) -> None:
    """InvalidInput for values of the recipe's schedule that it would refuse behind the scores."""
    if recipe.schedule is not None:
        recover = recovery_settings(recipe.recover, recipe.device)
        check_schedule(recipe.schedule.name, {**recipe.schedule.options, "recover": recover})


def calibration(task: Task, limited: bool) -> tuple[list[Any], list[Any]]:
    """(batches to score and compensate on, batches that measure quality): the same, unless a limit on the quality needs some that
    nothing was fitted to."""
    batches = list(task.calibration)
    if not limited or len(batches) < HELD_OUT_EVERY:
        return batches, batches
    held_out = batches[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]
    return [batch for index, batch in enumerate(batches) if index % HELD_OUT_EVERY != HELD_OUT_EVERY - 1], held_out


def recovery_settings(section: RecoverSection | None, device: str) -> RecoverySettings | None:
    if section is None:
        return None
    options = as_asked(device) | ({} if section.quantise is None else {"quantise": section.quantise})
    return RecoverySettings(section.steps, section.minutes, section.lr, section.method, section.distil, options, section.last)


@contextmanager
def shown(stages: Stages) -> Iterator[ShowProgress]:
    """Gives a schedule its progress: one stage of the run for each of its own."""
    opened: dict[str, Any] = {}

    with ExitStack() as stack:

        def show(title: str, done: int, total: int) -> None:
            if title not in opened:
                stack.close()
                opened.clear()
                opened[title] = stack.enter_context(stages.stage(title))
            opened[title](done, total)

        yield show
