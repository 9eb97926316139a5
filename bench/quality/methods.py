"""The methods that are compared: each scores once, plans for a fraction of heads, and cuts, in its own published form.

A method is three functions, so that the time and memory of each step can be told apart; what the first one gives is handed to
the others. A method that cannot do what is asked raises `Refused` with its reason, which becomes the row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

import headprune as hp
from headprune.evaluation.tasks import Task
from headprune.planning import PruningPlan
from headprune.recipe import Recipe, load_recipe

RECIPES = Path(__file__).parents[2] / "recipes"


class Refused(Exception):
    """A method cannot do what is asked; the message says why."""


@dataclass(frozen=True)
class Setting:
    """What every method is given: the dense model (not to be changed), the task with its calibration data, and the seed."""

    name: str  # of the model, and of its recipe
    model: nn.Module
    task: Task
    seed: int

    def recipe(self, fraction: float) -> Recipe:
        """That of the repository, for another budget."""
        return load_recipe(RECIPES / f"{self.name}.yaml", [f"plan.budget={{heads: {fraction}}}"])


@dataclass(frozen=True)
class Planned:
    """The heads that stay, by site; model: a method that cuts by itself has done so already."""

    keep: PruningPlan
    model: nn.Module | None = None
    note: str = ""


@dataclass(frozen=True)
class Method:
    """score(setting), plan(setting, scored, fraction) and cut(setting, scored, planned, copy of the model), which is then cut."""

    name: str
    label: str
    form: str  # its published form, in a few words
    score: Callable[[Setting], Any]
    plan: Callable[[Setting, Any, float], Planned]
    cut: Callable[[Setting, Any, Planned, nn.Module], nn.Module]
    settings: Callable[[str], dict[str, Any]] = field(default=lambda model: {})  # what else its rows depend on
    seeded: bool = True  # False: it reads no data and draws nothing, so that all seeds are one


_methods: dict[str, Method] = {}


def register(method: Method) -> Method:
    _methods[method.name] = method
    return method


def methods() -> dict[str, Method]:
    """Every method by name, in the order of the table."""
    return dict(_methods)


def plain_cut(setting: Setting, scored: Any, planned: Planned, model: nn.Module) -> nn.Module:
    hp.prune(model, planned.keep)
    return model


def resolved_cut(setting: Setting, scored: Any, planned: Planned, model: nn.Module) -> nn.Module:
    """With our compensation."""
    hp.prune(model, planned.keep, setting.task.calibration, forward=setting.task.forward)
    return model


def global_plan(setting: Setting, scores: hp.HeadScores, fraction: float) -> Planned:
    return Planned(hp.plan(scores, hp.Budget(heads=fraction)))


def even_plan(granularity: str) -> Callable[[Setting, hp.HeadScores, float], Planned]:
    """As many heads from every layer as from any other, or one more where the total asks for it, spread over the layers."""

    def plan(setting: Setting, scores: hp.HeadScores, fraction: float) -> Planned:
        units = {name: units_of(scores, name, granularity) for name in scores}
        total = sum(len(some) for some in units.values())
        gone = int(fraction * total + 1e-9)
        keep = {}
        for index, (name, some) in enumerate(units.items()):
            before, after = (round(number * gone / len(units)) for number in (index, index + 1))
            stays = some[after - before :]
            keep[name] = tuple(sorted(head for heads in stays for head in heads))
        return Planned(hp.PruningPlan.from_keep(setting.model, keep))

    return plan


def units_of(scores: hp.HeadScores, name: str, granularity: str) -> list[tuple[int, ...]]:
    """The query heads of a site one by one, or the groups that share a key/value head; lowest mean score first."""
    head_map, values = scores.shapes[name].head_map, scores[name].tolist()
    if granularity == "query_head":
        groups = [(head,) for head in range(head_map.query_heads)]
    else:
        owners = head_map.kv_of_query
        groups = [tuple(h for h, owner in enumerate(owners) if owner == kv) for kv in range(head_map.kv_heads)]
    return sorted(groups, key=lambda heads: (sum(values[head] for head in heads) / len(heads), heads))


def scored_by(criterion: str, normalize: str = "none") -> Callable[[Setting], hp.HeadScores]:
    def score(setting: Setting) -> hp.HeadScores:
        batches = setting.task.calibration if hp.criteria()[criterion].needs else ()
        return hp.score(setting.model, batches, criterion, normalize=normalize, loss_fn=setting.task.loss)

    return score


def random_scores(setting: Setting) -> hp.HeadScores:
    """Another draw for each seed."""
    found = hp.score(setting.model, criterion="random")
    generator = torch.Generator().manual_seed(setting.seed)
    drawn = {name: torch.rand(len(found[name]), generator=generator) for name in found}
    return hp.HeadScores("random", drawn, dict(found.shapes))
