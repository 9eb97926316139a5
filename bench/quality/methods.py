"""The methods that are compared: each scores once, plans for a fraction of heads, and cuts, in its own published form.

A method names what has to be observed: methods with the same needs share that pass over the data, and each counts it in full. The
rest is three functions, so that the time and memory of each step can be told apart; what the first one gives is handed to the
others. A method that cannot do what is asked raises `Refused` with its reason, which becomes the row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from spent import Spent, spending
from torch import nn

import headprune as hp
from headprune.evaluation.tasks import Task
from headprune.planning import PruningPlan
from headprune.recipe import Recipe, load_recipe
from headprune.scoring import Need

RECIPES = Path(__file__).parents[2] / "recipes"
WEIGHTS = frozenset({Need.WEIGHTS})


class Refused(Exception):
    """A method cannot do what is asked; the message says why."""


@dataclass(frozen=True)
class Pass:
    """One pass over the calibration data, and what it took."""

    observed: hp.Observations
    spent: Spent


@dataclass(frozen=True)
class Setting:
    """What every method is given: the dense model (not to be changed), the task with its calibration data, and the seed."""

    name: str  # of the model, and of its recipe
    model: nn.Module
    task: Task
    seed: int
    passes: dict[frozenset[Need], Pass] = field(default_factory=dict)

    def observe(self, needs: frozenset[Need]) -> Pass:
        """Each set of needs once."""
        if needs not in self.passes:
            with spending() as spent:
                batches = self.task.calibration if needs - {Need.WEIGHTS} else ()
                observed = hp.observe(self.model, batches, needs, loss_fn=self.task.loss)
            self.passes[needs] = Pass(observed, spent)
        return self.passes[needs]


def recipe_of(model: str, fraction: float = 0.5) -> Recipe:
    """That of the repository, for a budget of heads."""
    return load_recipe(RECIPES / f"{model}.yaml", [f"plan.budget={{heads: {fraction}}}"])


@dataclass(frozen=True)
class Planned:
    """The heads that stay, by site; model: a method that cuts by itself has done so already."""

    keep: PruningPlan
    model: nn.Module | None = None
    note: str = ""


Plan = Callable[[Setting, Any, float], Planned]


@dataclass(frozen=True)
class Method:
    """score(setting, observed), plan(setting, scored, fraction) and cut(setting, scored, planned, copy of the model)."""

    name: str
    label: str
    form: str  # its published form, in a few words
    score: Callable[[Setting, hp.Observations], Any]
    plan: Plan
    cut: Callable[[Setting, Any, Planned, nn.Module], nn.Module]
    needs: Callable[[str], frozenset[Need]] = lambda model: frozenset()  # by the model's name
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


def even_plan(granularity: str) -> Plan:
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


def scored_by(criterion: str, normalize: str = "none") -> dict[str, Any]:
    """`score` and `needs` of a method that ranks heads by one of our criteria."""
    return {
        "score": lambda setting, observed: hp.score_observations(observed, criterion, normalize),
        "needs": lambda model: hp.criteria()[criterion].needs,
    }


def random_scores(setting: Setting, observed: hp.Observations) -> hp.HeadScores:
    """Another draw for each seed."""
    generator = torch.Generator().manual_seed(setting.seed)
    shapes = {name: site.shape for name, site in observed.items()}
    drawn = {name: torch.rand(shape.head_map.query_heads, generator=generator) for name, shape in shapes.items()}
    return hp.HeadScores("random", drawn, shapes)
