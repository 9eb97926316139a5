"""A whole run of a recipe in one folder: each value of the way is saved as it is made, and a killed run goes on from there."""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from headprune.errors import HeadpruneError, InvalidInput
from headprune.evaluation import Comparison, compare
from headprune.evaluation.tasks import Task, build_task, check_task_options
from headprune.files import alone_in, read_json, refuse_unwritable, write_json, write_text
from headprune.models.placement import chosen_device
from headprune.models.streamed import streamed_of
from headprune.planning import PruningPlan
from headprune.recipe import Recipe, load_recipe
from headprune.report.model_card import write_card
from headprune.report.progress import Stages
from headprune.report.web_page import report
from headprune.run_inputs import FILE, KIND, refuse_changed, run_inputs
from headprune.run_recovery import recovered_model
from headprune.run_schedule import refuse_schedule, scheduled_model
from headprune.run_streamed import pruned_in_files, reads_streamed, show_estimate
from headprune.run_values import STATES, kept, loaded_beside, measure_for_report, plan_of, refuse_infeasible, scored
from headprune.scoring import HeadScores
from headprune.sources import open_from_disk, open_model, opening
from headprune.surgery import prune, save
from headprune.surgery.verify import cut_error, relative_difference, same_tokens

log = logging.getLogger("headprune")
AFTER_SCORES = {"plan", "prune", "recover", "schedule", "evaluate"}  # sections of a recipe
BEFORE_SCORES = {"recipe.yaml", FILE, "log.txt", STATES}  # files of a run; the states know themselves which pass they are of
TOLERANCE, STEPS = 1e-4, 32  # relative: cutting reorders sums; so many steps of a dtype that is coarser than fp32


@dataclass(frozen=True)
class RunResult:
    """What a run leaves: the comparison of dense and pruned, the plan, what was checked, where the report is, and what each stage
    took that was not taken up from an earlier try."""

    folder: Path
    plan: PruningPlan
    comparison: Comparison
    checks: dict[str, Any]
    report: Path
    stages: Stages

    def to_json(self) -> dict[str, Any]:
        """As result.json, with the folder, the report and the heads that the plan keeps."""
        places = {
            "folder": str(self.folder),
            "report": str(self.report),
            "keep": {name: list(heads) for name, heads in self.plan.items()},
        }
        return {**places, "checks": self.checks, "comparison": self.comparison.to_json(), "stages": self.stages.to_json()}


def run(recipe: Recipe, stages: Stages) -> RunResult:
    """Carries `recipe` out in `recipe.output`; what a killed run of the same recipe left there is taken up.

    Raises InvalidInput where the folder holds a run of another recipe, or of other weights or data of the same names, or where
    another process is at work in it; HeadpruneError where a check fails.
    """
    folder = Path(recipe.output)
    refuse_foreign(folder, recipe)
    refuse_schedule(recipe)
    kind = check_task_options(recipe.task.name, recipe.task.options)
    if recipe.plan.file:
        PruningPlan.load(recipe.plan.file)  # refused before anything is measured
    torch.manual_seed(recipe.seed)
    device = chosen_device(recipe.device)
    streamed = reads_streamed(recipe, device)
    with stages.stage(opening(recipe.model)) as progress:
        if streamed:
            dense, tokenizer = open_from_disk(recipe.model, device, kind.base)
        else:
            dense, tokenizer = open_model(recipe.model, progress, device, kind.base)
    kind.check_options(dense, recipe.task.options)
    refuse_infeasible(dense, recipe)
    with stages.stage(f"prepare {recipe.task.name}"):
        task = build_task(recipe.task.name, tokenizer, **recipe.task.options)
        task.check_model(dense)
    if streamed:
        show_estimate(recipe, task, stages)
    inputs = run_inputs(recipe, task)
    with alone_in(folder):
        refuse_foreign(folder, recipe)  # once more: another process may have been here meanwhile
        refuse_changed(recipe, inputs)
        write_text(folder / "recipe.yaml", recipe.to_yaml())
        write_json(folder / FILE, KIND, inputs)
        scores = scored(dense, task, recipe, stages)
        chosen, pruned, checks = smaller_model(dense, task, scores, recipe, folder, stages)
        with stages.stage("evaluate dense and pruned") as progress:
            comparison = compare(dense, pruned, task, repeats=recipe.evaluate.repeats, progress=progress)
        write_json(
            folder / "result.json", "run_result", {"checks": checks, "comparison": comparison.to_json(), "stages": stages.to_json()}
        )
        write_card(folder)
        measure_for_report(dense, task, scores, recipe, stages)
        return RunResult(folder, chosen, comparison, checks, report(folder), stages)


def smaller_model(
    dense: PreTrainedModel, task: Task, scores: HeadScores, recipe: Recipe, folder: Path, stages: Stages
) -> tuple[PruningPlan, PreTrainedModel, dict[str, Any]]:
    """The plan, the model that it leads to (by a schedule, or cut once and recovered where that is asked for), what was checked."""
    if recipe.schedule:
        chosen, pruned, checks = scheduled_model(dense, task, recipe, folder, stages)
        refuse_failed(checks, tolerance(dense))
        return chosen, pruned, checks
    chosen = kept(folder / "plan.json", PruningPlan.load, lambda: planned(dense, task, scores, recipe, stages))
    if streamed_of(dense):
        return chosen, *pruned_in_files(task, chosen, recipe, folder, stages)
    pruned, checks = pruned_model(dense, task, chosen, recipe, folder, stages)
    return chosen, recovered_model(dense, pruned, task, recipe, folder, stages), checks


def refuse_foreign(folder: Path, recipe: Recipe) -> None:
    """InvalidInput unless `folder` is new, empty, or holds a run of this very recipe, and may be written to."""
    refuse_unwritable(folder, file=False)
    existing = folder / "recipe.yaml"
    if existing.exists() and work_in(folder, load_recipe(existing)) != work_in(folder, recipe):
        raise InvalidInput(f"{folder} holds a run of another recipe; give another output (output=...), or remove that folder.")
    if (
        not existing.exists() and folder.exists() and any(not path.name.startswith(".") for path in folder.iterdir())
    ):  # half-written
        raise InvalidInput(f"{folder} is not empty and holds no run; give another output (output=...).")


def work_in(folder: Path, recipe: Recipe) -> dict[str, Any]:
    """Of the recipe what `folder` was made by: not what its report shows beside the run, which may be asked for later; before there
    is a plan, nothing that comes after the scores; and before there are scores, not how they are made."""
    made = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    later = set() if made & {"plan.json", "schedule"} else AFTER_SCORES if made - BEFORE_SCORES else AFTER_SCORES | {"score"}
    return recipe.model_dump(exclude={"report", *later})


def planned(dense: PreTrainedModel, task: Task, scores: HeadScores, recipe: Recipe, stages: Stages) -> PruningPlan:
    """The plan that the recipe's budget gives, or the one that it names."""
    if recipe.plan.file:
        return PruningPlan.load(recipe.plan.file)
    with stages.stage("try plans, pruned and compensated" if recipe.plan.trials else "plan") as progress:
        return plan_of(recipe, dense, task, scores, progress)


def pruned_model(
    dense: PreTrainedModel, task: Task, chosen: PruningPlan, recipe: Recipe, folder: Path, stages: Stages
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The pruned model as it loads from disk, and what was checked when it was made."""
    target = folder / "model"
    if (folder / "checks.json").exists():
        log.info("taking up %s", target)
        return loaded_beside(dense, target), read_json(folder / "checks.json", "run_checks")["checks"]
    pruned = copy.deepcopy(dense)
    calibration = task.calibration if recipe.prune.compensate else None
    with stages.stage("cut and re-solve output projections" if calibration else "cut") as progress:
        resolved = prune(
            pruned, chosen, calibration, forward=task.forward, feed_forward=recipe.prune.feed_forward, progress=progress
        )
    for site in resolved:
        log.info("%s: output error %.3f -> %.3f (ridge %s)", site.site, site.error_before, site.error_after, site.ridge)
    ends = [part.site for part in resolved if part.site not in chosen]
    with stages.stage("check, save and load back"):
        checks: dict[str, Any] = {"cut_equals_gated": cut_error(dense, pruned, chosen, task.outputs, ends)}
        prompt = task.prompt()
        if prompt is not None and tolerance(dense) == TOLERANCE:  # coarser, the order of a sum decides between near words
            checks["generates_as_gated"] = same_tokens(dense, pruned, chosen, prompt, resolved=ends)
        expected = task.outputs(pruned)
        save(pruned, target)
        loaded = loaded_beside(dense, target)
        checks["reload"] = relative_difference(task.outputs(loaded), expected)
    refuse_failed(checks, tolerance(dense))
    write_json(folder / "checks.json", "run_checks", {"checks": checks})
    return loaded, checks


def tolerance(model: torch.nn.Module) -> float:
    """How far outputs that should be the same may lie apart; each cut attention was compared in fp32 before."""
    steps = (torch.finfo(weight.dtype).eps for weight in model.parameters() if weight.is_floating_point())
    return max(TOLERANCE, STEPS * max(steps, default=0.0))


def refuse_failed(checks: dict[str, Any], allowed: float) -> None:
    failed = {name: found for name, found in checks.items() if found is False or (found is not True and not found <= allowed)}
    if failed:
        raise HeadpruneError(f"the pruned model failed its own checks: {failed} (expected true, or at most {allowed:g}).")
