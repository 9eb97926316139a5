"""The recovery of a run: training after the cut, where the recipe asks for it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from headprune.evaluation.tasks import Task
from headprune.models.placement import trainer_options
from headprune.recipe import Recipe
from headprune.recovery import recover
from headprune.report.progress import Stages
from headprune.run_values import loaded_beside
from headprune.surgery import save

log = logging.getLogger("headprune")


def recovered_model(
    dense: PreTrainedModel, pruned: PreTrainedModel, task: Task, recipe: Recipe, folder: Path, stages: Stages
) -> PreTrainedModel:
    """`pruned`, recovered as the recipe asks and saved to `folder`/recovered; itself where it asks for nothing. A killed recovery
    goes on from its last checkpoint."""
    section = recipe.recover
    if section is None:
        return pruned
    if (folder / "recovered").exists():
        log.info("taking up %s", folder / "recovered")
        return loaded_beside(dense, folder / "recovered")
    with stages.stage("recover from the dense model" if section.distil else "recover") as progress:
        result = recover(
            pruned, task.training(), loss_fn=task.loss, teacher=dense if section.distil else None, method=section.method,
            steps=section.steps, minutes=section.minutes, lr=section.lr, quantise=section.quantise, seed=recipe.seed,
            output_dir=folder / "recovery", progress=progress, **as_asked(recipe.device),
        )  # fmt: skip
    result.refuse_diverged(section.lr)
    log.info("recovery: %s", result)
    save(pruned, folder / "recovered")
    return loaded_beside(dense, folder / "recovered")


def as_asked(device: str) -> dict[str, Any]:
    """What makes a recovery train on the CPU where the recipe names that; else it takes the model's GPU by itself."""
    return trainer_options(torch.device("cpu")) if device == "cpu" else {}
