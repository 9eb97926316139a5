"""A whole run of a recipe in one folder: each value of the way is saved as it is made, and a killed run goes on from there."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from torch import nn
from transformers import PreTrainedModel

from headprune.errors import HeadpruneError, InvalidInput
from headprune.evaluation import Comparison, compare
from headprune.evaluation.tasks import Task, build_task, check_task
from headprune.files import read_json, write_json, write_text
from headprune.planning import Budget, PruningPlan, plan
from headprune.recipe import Recipe
from headprune.report.progress import Stages
from headprune.scoring import HeadScores, get_criterion, score
from headprune.sources import open_model, opening
from headprune.surgery import load, prune, save
from headprune.surgery.verify import cut_error, relative_difference, same_tokens

Value = TypeVar("Value")
log = logging.getLogger("headprune")
TOLERANCE = 1e-4  # relative, fp32: cutting reorders sums


@dataclass(frozen=True)
class RunResult:
    """What a run leaves: the comparison of dense and pruned, the plan, and what was checked."""

    folder: Path
    plan: PruningPlan
    comparison: Comparison
    checks: dict[str, Any]


def run(recipe: Recipe, stages: Stages) -> RunResult:
    """Carries `recipe` out in `recipe.output`; what a killed run of the same recipe left there is taken up.

    Raises InvalidInput where the folder holds a run of another recipe; HeadpruneError where a check fails.
    """
    folder = Path(recipe.output)
    refuse_foreign(folder, recipe)
    check_task(recipe.task.name)
    torch.manual_seed(recipe.seed)
    with stages.stage(opening(recipe.model)) as progress:
        dense, tokenizer = open_model(recipe.model, progress)
    with stages.stage(f"prepare {recipe.task.name}"):
        task = build_task(recipe.task.name, tokenizer, **recipe.task.options)
        task.check_model(dense)
    write_text(folder / "recipe.yaml", recipe.to_yaml())
    scores = kept(folder / "scores.json", HeadScores.load, lambda: scored(dense, task, recipe, stages))
    chosen = kept(folder / "plan.json", PruningPlan.load, lambda: planned(scores, recipe))
    pruned, checks = pruned_model(dense, task, chosen, recipe, folder, stages)
    with stages.stage("evaluate dense and pruned") as progress:
        comparison = compare(dense, pruned, task, repeats=recipe.evaluate.repeats, progress=progress)
    write_json(folder / "result.json", "run_result", {"checks": checks, "comparison": comparison.to_json()})
    return RunResult(folder, chosen, comparison, checks)


def refuse_foreign(folder: Path, recipe: Recipe) -> None:
    """InvalidInput unless `folder` is new, empty, or holds a run of this very recipe."""
    existing = folder / "recipe.yaml"
    if existing.exists() and yaml.safe_load(existing.read_text(encoding="utf-8")) != yaml.safe_load(recipe.to_yaml()):
        raise InvalidInput(f"{folder} holds a run of another recipe; give another output (output=...), or remove that folder.")
    if not existing.exists() and folder.exists() and any(folder.iterdir()):
        raise InvalidInput(f"{folder} is not empty and holds no run; give another output (output=...).")


def kept(path: Path, read: Callable[[Path], Value], make: Callable[[], Value]) -> Value:
    """What an earlier try of this run saved at `path`, else made now and saved."""
    if path.exists():
        log.info("taking up %s", path)
        return read(path)
    value = make()
    value.save(path)
    return value


def scored(model: nn.Module, task: Task, recipe: Recipe, stages: Stages) -> HeadScores:
    batches = task.calibration if get_criterion(recipe.score.criterion).needs else ()
    with stages.stage(f"score heads by {recipe.score.criterion}") as progress:
        return score(
            model,
            batches,
            recipe.score.criterion,
            normalize=recipe.score.normalize,
            loss_fn=task.loss,
            progress=lambda done: progress(done, len(batches)),
        )


def planned(scores: HeadScores, recipe: Recipe) -> PruningPlan:
    section = recipe.plan
    return plan(
        scores,
        Budget(**section.budget),
        allocation=section.allocation,
        granularity=section.granularity,
        min_heads=section.min_heads,
        protect=section.protect,
        target=section.target,
    )


def pruned_model(
    dense: PreTrainedModel, task: Task, chosen: PruningPlan, recipe: Recipe, folder: Path, stages: Stages
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The pruned model as it loads from disk, and what was checked when it was made."""
    target = folder / "model"
    if (folder / "checks.json").exists():
        log.info("taking up %s", target)
        return load(target), read_json(folder / "checks.json", "run_checks")["checks"]
    pruned = copy.deepcopy(dense)
    calibration = task.calibration if recipe.prune.compensate else None
    with stages.stage("cut and re-solve output projections" if calibration else "cut") as progress:
        resolved = prune(pruned, chosen, calibration, forward=task.forward, progress=progress)
    for site in resolved:
        log.info("%s: output error %.3f -> %.3f (ridge %s)", site.site, site.error_before, site.error_after, site.ridge)
    with stages.stage("check, save and load back"):
        checks: dict[str, Any] = {"cut_equals_gated": cut_error(dense, pruned, chosen, task.outputs)}
        prompt = task.prompt()
        if prompt is not None:
            checks["generates_as_gated"] = same_tokens(dense, pruned, chosen, prompt)
        expected = task.outputs(pruned)
        save(pruned, target, tokenizer=task.tokenizer)
        loaded = load(target)
        checks["reload"] = relative_difference(task.outputs(loaded), expected)
    refuse_failed(checks)
    write_json(folder / "checks.json", "run_checks", {"checks": checks})
    return loaded, checks


def refuse_failed(checks: dict[str, Any]) -> None:
    failed = {name: found for name, found in checks.items() if found is False or (found is not True and not found <= TOLERANCE)}
    if failed:
        raise HeadpruneError(f"the pruned model failed its own checks: {failed} (expected true, or at most {TOLERANCE}).")
