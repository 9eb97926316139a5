"""A run whose model does not fit into memory: it is read layer by layer, and pruned in its files."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import PreTrainedModel

from headprune.embedded import EMBEDDED
from headprune.errors import InvalidInput
from headprune.evaluation import estimate
from headprune.evaluation.estimate import DEVICES
from headprune.evaluation.tasks import Task
from headprune.files import read_json, write_json
from headprune.models.placement import chosen_device
from headprune.models.shards import INDEX, SINGLE, open_shards
from headprune.planning import Budget, PruningPlan
from headprune.recipe import Recipe
from headprune.report.progress import Stages
from headprune.sources import model_folder
from headprune.surgery import open_streamed, prune_folder

log = logging.getLogger("headprune")
COPIES = 3  # of the weights, in a run in memory: the dense model, the pruned one, and what surgery and evaluation hold beside them


def reads_streamed(recipe: Recipe, device: torch.device) -> bool:
    """Whether the run reads its model layer by layer: as the recipe says, or ("auto") where the free memory of this machine, or of
    `device`, does not hold the weights as often as a run in memory does. Raises InvalidInput where the recipe asks for what takes
    it whole."""
    if recipe.memory == "resident" or (recipe.memory == "auto" and fits(recipe.model, device)):
        return False
    asked = {
        "schedule": recipe.schedule,
        "recover": recipe.recover,
        "plan.trials": recipe.plan.trials,
        "report.sensitivity": recipe.report.sensitivity,
        "report.sweep": recipe.report.sweep,
    }
    wrong = next((name for name, value in asked.items() if value), None)
    if wrong:
        raise InvalidInput(
            f"{wrong} takes the whole model in memory, and with memory={recipe.memory} this run reads it by layers; leave it out."
        )
    return True


def fits(name: str, device: torch.device) -> bool:
    """Whether a run in memory fits; what is no folder of safetensors is left to the run to refuse, to make, or to load whole."""
    if name in EMBEDDED or not (Path(name).is_dir() or "/" in name):
        return True
    folder = model_folder(name)
    if not any((folder / file).is_file() for file in (SINGLE, INDEX)):
        return True
    weights = open_shards(folder).nbytes
    room = {"memory": (weights if device.type == "cuda" else COPIES * weights, psutil.virtual_memory().available)}
    if device.type == "cuda":
        room[str(device)] = (COPIES * weights, torch.cuda.mem_get_info(device)[0])
    for place, (needed, free) in room.items():
        if needed > free:
            line = "%s takes about %.1f GB in %s and %.1f GB are free: it is read layer by layer"
            log.warning(line, name, needed / 1e9, place, free / 1e9)
            return False
    return True


def show_estimate(recipe: Recipe, task: Task, stages: Stages) -> None:
    """What scoring will take, before it begins; nothing where the task's batches are not of tokens, or nobody knows the GPU."""
    shapes = [next(iter(batch.values())).shape for batch in task.calibration]
    device = known_name(chosen_device(recipe.device))
    if device is None or not shapes or any(len(shape) != 2 for shape in shapes):
        return
    (batch, length), tokens = shapes[0], sum(shape.numel() for shape in shapes)
    folder, budget = model_folder(recipe.model), Budget.of(recipe.plan.budget)
    found = estimate(folder, budget, tokens=tokens, batch=batch, length=length, device=device)
    stages.console.print(found.scoring())


def known_name(device: torch.device) -> str | None:
    """What `estimate` calls `device`; None for a GPU that it does not know."""
    if device.type == "cpu":
        return "cpu"
    told = set(re.split(r"\W+", torch.cuda.get_device_name(device).lower()))
    return next((name for name in DEVICES if told.issuperset(name.split("-"))), None)


def pruned_in_files(
    task: Task, chosen: PruningPlan, recipe: Recipe, folder: Path, stages: Stages
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The pruned model, read from its files as it runs, and what was checked when they were written."""
    target, device = folder / "model", chosen_device(recipe.device)
    if (folder / "checks.json").exists():
        log.info("taking up %s", target)
        return open_streamed(target, device=device), read_json(folder / "checks.json", "run_checks")["checks"]
    calibration = task.calibration if recipe.prune.compensate else None
    with stages.stage("cut and re-solve output projections, layer by layer" if calibration else "cut file by file") as progress:
        prune_folder(
            model_folder(recipe.model), chosen, target, calibration, forward=task.forward,
            feed_forward=recipe.prune.feed_forward, device=device, progress=progress,
        )  # fmt: skip
    checks = {"cut_equals_gated": True}  # by prune_folder, which fails otherwise
    write_json(folder / "checks.json", "run_checks", {"checks": checks})
    return open_streamed(target, device=device), checks
