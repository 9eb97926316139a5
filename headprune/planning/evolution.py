"""Evolutionary search over the number of heads of every layer, on the real calibration loss.

Level switches and selection in rounds as in EvoPress (Sieberling et al. 2024): a child has some heads more in one layer and some
fewer in another, at the same budget. A whole generation is one batch of head masks, so that it costs few forward passes.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from headprune.arguments import check_arguments
from headprune.errors import InvalidInput, whole_number
from headprune.models import attention_sites
from headprune.models.batches import several
from headprune.planning.budget import Budget
from headprune.planning.pruning_plan import PruningPlan
from headprune.planning.sensitivity import removal_order
from headprune.scoring.masked_losses import MaskedLosses
from headprune.scoring.observer import LossFunction

Fitness = Callable[[Sequence[PruningPlan]], Sequence[float]]  # lower is better
Counts = tuple[int, ...]  # heads removed at each site


@dataclass(frozen=True)
class Evolution:
    """plan: the best one found; start, best: its ancestor's and its own fitness; history: the best after each generation."""

    plan: PruningPlan
    start: float
    best: float
    history: tuple[float, ...]


def evolve(
    plan: PruningPlan,
    fitness: Fitness,
    *,
    generations: int = 10,
    children: int = 8,
    switches: int = 2,
    min_heads: int = 1,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Evolution:
    """Improves `plan`, which must have scores and a budget: within each layer its scores alone say which heads go.

    Args:
        fitness: plans -> one number each, lower is better; `masked_fitness` is the calibration loss, without compensation.
        children: plans tried in each generation, each once in the whole search.
        switches: how many heads a child moves from one layer to another at most. No child costs more than `plan`.

    Raises InvalidInput for a plan without scores or budget, for one whose heads do not go by its scores (some are protected, or go
    by groups), and for a fitness that is NaN.
    """
    check_arguments(evolve, locals())
    for name, value, least in (("generations", generations, 0), ("children", children, 1), ("switches", switches, 1)):
        whole_number(name, value, least)
    space = Space.of(plan, whole_number("min_heads", min_heads, least=0))
    source, best = random.Random(seed), space.start
    (start,) = measured(fitness, [space.plan(best)])
    level, history, seen = start, [], {best}
    for done in range(generations):
        tried = {space.mutated(best, source, switches) for _ in range(4 * children)} - seen
        offspring = sorted(tried)[:children] if len(tried) <= children else source.sample(sorted(tried), children)
        seen |= set(offspring)
        found = measured(fitness, [space.plan(child) for child in offspring])
        if found and min(found) < level:
            level = min(found)
            best = offspring[found.index(level)]
        history.append(level)
        if progress:
            progress(done + 1, generations)
    return Evolution(space.plan(best), start, level, tuple(history))


def measured(fitness: Fitness, plans: Sequence[PruningPlan]) -> list[float]:
    """One number for each plan. Raises InvalidInput where one is NaN: no plan beside it would be found better."""
    found = [float(value) for value in fitness(plans)] if plans else []
    if len(found) != len(plans) or any(value != value for value in found):
        raise InvalidInput(f"the fitness of {len(plans)} plans is {found!r:.80}; expected as many numbers, none of them NaN.")
    return found


@dataclass(frozen=True)
class Space:
    """All plans in which each site loses its first heads in the order of the scores, within what `origin` costs by `budget`."""

    origin: PruningPlan
    budget: Budget
    order: dict[str, tuple[int, ...]]
    most: Counts  # heads that each site may lose
    limit: int

    @classmethod
    def of(cls, plan: PruningPlan, min_heads: int) -> Space:
        scores, budget = plan.scores, plan.budget
        if scores is None or budget is None:
            raise InvalidInput("evolution starts from a plan with scores and a budget, as hp.plan makes it.")
        order: dict[str, tuple[int, ...]] = {}
        most = []
        for name in plan:
            order[name] = () if name in scores.unreached else removal_order(scores[name].tolist())
            most.append(max(0, len(order[name]) - min_heads))
        limit = sum(budget.cost(plan.shapes[name], plan.head_map(name), name) for name in plan)
        found = cls(plan, budget, order, tuple(most), limit)
        for name, heads in found.keep(found.start).items():
            if heads != plan[name]:
                raise InvalidInput(
                    f"at {name} the plan keeps heads {list(plan[name])}, by its scores {list(heads)} would stay, which is what "
                    "evolution goes by. Give a plan of hp.plan without protect, granularity='query_head', or use hp.search_plan, "
                    "which takes any."
                )
        return found

    @property
    def start(self) -> Counts:
        return tuple(self.origin.shapes[name].head_map.query_heads - len(heads) for name, heads in self.origin.items())

    def keep(self, counts: Counts) -> dict[str, tuple[int, ...]]:
        kept = {}
        for (name, shape), count in zip(self.origin.shapes.items(), counts):
            kept[name] = tuple(sorted(set(range(shape.head_map.query_heads)) - set(self.order[name][:count])))
        return kept

    def cost(self, counts: Counts) -> int:
        shapes = self.origin.shapes
        return sum(
            self.budget.cost(shapes[name], shapes[name].head_map.keep(kept), name) for name, kept in self.keep(counts).items()
        )

    def plan(self, counts: Counts) -> PruningPlan:
        return replace(self.origin, keep=self.keep(counts))

    def mutated(self, counts: Counts, source: random.Random, switches: int) -> Counts:
        """`counts` after up to `switches` heads went from one site to another; itself where no such step is in the budget."""
        child = list(counts)
        for _ in range(source.randint(1, switches)):
            losing = [site for site, count in enumerate(child) if count < self.most[site]]
            gaining = [site for site, count in enumerate(child) if count > 0]
            if not losing or not gaining:
                break
            child[source.choice(losing)] += 1
            child[source.choice(gaining)] -= 1
        return tuple(child) if any(child) and self.cost(tuple(child)) <= self.limit else counts


def masked_fitness(model: nn.Module, batches: Iterable[Any], *, loss_fn: LossFunction | None = None, rows: int = 64) -> Fitness:
    """Mean loss over `batches` with the heads of each plan switched off, all plans in one fold of the batch.

    batches, loss_fn: as for `hp.observe`. rows: how many samples a forward pass may hold.
    """
    check_arguments(masked_fitness, locals())
    masked = MaskedLosses(model, attention_sites(model), loss_fn, rows)
    runs = [masked.on(batch) for batch in several(batches)]
    if not runs:
        raise InvalidInput("the calibration set is empty; a search needs at least one batch.")
    if not any(run.reached for run in runs):
        raise InvalidInput(
            f"no attention of {type(model).__name__} was reached by the calibration set, so there is nothing to compare. Where its "
            "attention is torch's own function, call headprune.nn.replace_multihead_attention(model) first."
        )

    def fitness(plans: Sequence[PruningPlan]) -> list[float]:
        masks = {name: torch.stack([open_heads(plan, name) for plan in plans]) for name in plans[0]}
        losses = torch.cat([run.losses({name: masks[name] for name in run.reached}) for run in runs], dim=1)
        return losses.double().mean(dim=1).tolist()

    return fitness


def open_heads(plan: PruningPlan, name: str) -> torch.Tensor:
    """[query_heads]: 1 where the plan keeps the head."""
    gates = torch.zeros(plan.shapes[name].head_map.query_heads)
    gates[list(plan[name])] = 1.0
    return gates
