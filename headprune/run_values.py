"""What a run measures of the dense model, for its plan and for its report: scores, portraits, sensitivity, a sweep over budgets."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

from headprune.evaluation.tasks import Task
from headprune.models import attention_sites
from headprune.models.identity import ModelIdentity
from headprune.models.placement import device_of
from headprune.models.streamed import streamed_of
from headprune.nn.replace import own_attention
from headprune.planning import Budget, PruningPlan, Sensitivity, plan, sensitivity
from headprune.planning.engine import get_engine
from headprune.recipe import Recipe
from headprune.report.progress import Stages
from headprune.scoring import HeadScores, get_criterion, observe, portrait_needs, portraits, score_observations
from headprune.scoring.site_shape import SiteShape
from headprune.surgery import load, search_plan
from headprune.sweep import Sweep, sweep


class Saved(Protocol):
    """What can be written to a file, and taken up from there."""

    def save(self, path: Path, /) -> object: ...


Value = TypeVar("Value", bound=Saved)
STATES = "states"  # what a killed pass over a model on disk goes on from; large
log = logging.getLogger("headprune")


def kept(path: Path, read: Callable[[Path], Value], make: Callable[[], Value]) -> Value:
    """What an earlier try of this run saved at `path`, else made now and saved."""
    if path.exists():
        log.info("taking up %s", path)
        return read(path)
    value = make()
    value.save(path)
    return value


def loaded_beside(dense: nn.Module, folder: Path) -> PreTrainedModel:
    """The model of `folder`, on the device of `dense`."""
    model: Any = load(folder)
    found: PreTrainedModel = model.to(device_of(dense))
    return found


def scored(model: nn.Module, task: Task, recipe: Recipe, stages: Stages) -> HeadScores:
    """The run's scores. Those by the report's further criteria and the portraits come out of the same pass: all of these files are
    made where the run's own scores are missing, whatever a killed pass has left, and later only the missing ones."""
    folder, main = Path(recipe.output), recipe.score.criterion
    paths = {name: folder / f"scores-{name}.json" for name in recipe.report.criteria} | {main: folder / "scores.json"}
    whole = not paths[main].exists()
    missing = [name for name, path in paths.items() if whole or not path.exists()]
    portray = recipe.report.portraits and (whole or not (folder / "portraits.json").exists())
    needs = frozenset().union(*(get_criterion(name).needs for name in missing), portrait_needs(model) if portray else ())
    if missing or portray:
        batches = task.calibration[: recipe.score.batches] if needs else ()
        with stages.stage(f"score heads by {', '.join(missing)}" if missing else "portray heads") as progress:
            observed = observe(
                model, batches, needs, loss_fn=task.loss, token_kinds=task.token_kinds() if portray else None,
                progress=lambda done: progress(done, len(batches)), checkpoint=folder / STATES if streamed_of(model) else None,
                unreached=recipe.score.unreached,
            )  # fmt: skip
        if portray:
            portraits(observed).save(folder / "portraits.json")
        for name in sorted(missing, key=lambda name: name == main):  # the run's own last: with it, this stage is done
            found = score_observations(observed, name, recipe.score.normalize)
            replace(found, made_for=ModelIdentity.of(model)).save(paths[name])
    shutil.rmtree(folder / STATES, ignore_errors=True)
    return HeadScores.load(paths[main])


def measure_for_report(model: nn.Module, task: Task, scores: HeadScores, recipe: Recipe, stages: Stages) -> None:
    """Saves sensitivity.json and sweep.json in the run's folder, where the recipe's report asks for them."""
    folder, wanted = Path(recipe.output), recipe.report
    if wanted.sensitivity:
        kept(folder / "sensitivity.json", Sensitivity.load, lambda: measured_sensitivity(model, task, scores, stages))
    if wanted.sweep:
        kept(folder / "sweep.json", Sweep.load, lambda: measured_sweep(model, task, scores, recipe, stages))


def measured_sensitivity(model: nn.Module, task: Task, scores: HeadScores, stages: Stages) -> Sensitivity:
    with stages.stage("measure the sensitivity of every attention") as progress:
        return sensitivity(
            model, task.calibration, scores, loss_fn=task.loss, progress=lambda done: progress(done, len(task.calibration))
        )


def measured_sweep(model: nn.Module, task: Task, scores: HeadScores, recipe: Recipe, stages: Stages) -> Sweep:
    quantity = Budget.of(recipe.plan.budget).quantity
    budgets = [Budget.of(recipe.plan.budget | {quantity: fraction}) for fraction in recipe.report.sweep]
    with stages.stage("sweep over budgets") as progress:
        return sweep(
            model, task, scores, budgets, compensate=recipe.prune.compensate, repeats=recipe.evaluate.repeats, progress=progress,
            **planning_options(recipe),
        )  # fmt: skip


def planning_options(recipe: Recipe) -> dict[str, Any]:
    """The options of `hp.plan` that the recipe gives."""
    section = recipe.plan
    return {name: getattr(section, name) for name in ("allocation", "granularity", "min_heads", "protect", "target")}


def refuse_infeasible(model: nn.Module, recipe: Recipe) -> None:
    """Raises what `hp.plan` raises on the recipe's plan section whatever the scores, before hours go into them. With even groups
    what can be met depends on the scores, and only names are looked at."""
    with own_attention(model):
        shapes = {site.name: SiteShape.of(site) for site in attention_sites(model)}
    alike = {name: torch.zeros(shape.head_map.query_heads) for name, shape in shapes.items()}
    scores, even = HeadScores(recipe.score.criterion, alike, shapes), get_engine(recipe.plan.target).even_groups
    if recipe.plan.file is None:
        plan(scores, Budget(heads=0.0) if even else Budget.of(recipe.plan.budget), **planning_options(recipe))


def plan_of(
    recipe: Recipe, model: nn.Module, task: Task, scores: HeadScores, progress: Callable[[int, int], None] | None = None
) -> PruningPlan:
    """The plan that the recipe's section asks for: by scores alone, or by trying plans on the task's calibration data."""
    section, budget, options = recipe.plan, Budget.of(recipe.plan.budget), planning_options(recipe)
    if not section.trials:
        return plan(scores, budget, **options)
    return search_plan(
        model, scores, budget, task.calibration, trials=section.trials, forward=task.readout, seed=recipe.seed, progress=progress,
        **options,
    ).plan  # fmt: skip
