"""A search for how much each layer's scores count, on a measured error: which layers can spare heads shows only together.

As SPDY (Frantar & Alistarh 2022) weighs the layers' sensitivities by coefficients that a search finds, so that every plan it tries
meets the budget and all constraints.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import permutations
from typing import Any

from headprune.arguments import check_arguments
from headprune.errors import InvalidInput, whole_number
from headprune.planning.budget import Budget
from headprune.planning.engine import get_engine
from headprune.planning.planner import plan
from headprune.planning.pruning_plan import PruningPlan
from headprune.scoring.scores import HeadScores

Fitness = Callable[[Sequence[PruningPlan]], Sequence[float]]
log = logging.getLogger("headprune")
TILT = 2.0  # first step of the slope along the depth: the last layer counts e^2 times the first
STEP, GROWTH, STEEPEST = 0.02, 1.4, 32.0


@dataclass(frozen=True)
class Trial:
    """One plan that was tried: heads kept by site, the layers' weights (logarithms), and its error."""

    kept: tuple[int, ...]
    weights: tuple[float, ...]
    error: float


@dataclass(frozen=True)
class LayerSearch:
    """plan: the best one tried; trials: all of them, in order, the first with the scores as they are."""

    plan: PruningPlan
    trials: tuple[Trial, ...]

    @property
    def best(self) -> Trial:
        return min(self.trials, key=lambda trial: trial.error)

    def __str__(self) -> str:
        tried = (
            f"{len(self.trials)} plans tried, the best with error {self.best.error:.4g}, by scores alone {self.trials[0].error:.4g}"
        )
        return f"{self.plan}\n{tried}"


def search_layer_weights(
    scores: HeadScores,
    budget: Budget,
    error: Fitness,
    *,
    trials: int = 24,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> LayerSearch:
    """The plan of least `error` among those that `hp.plan` makes of `scores` with each layer's scores multiplied by a weight.

    First the weights rise or fall along the depth, ever steeper while that helps; then one layer counts more and another less, in
    random order, by as little as moves a head, and what is better is gone on from.

    Args:
        error: plans -> one number each, lower is better.
        trials: how many different plans are tried at most.
        options: of `hp.plan`.

    Raises what `hp.plan` raises, InvalidInput where trials is below 1, the allocation is "uniform" or an error is NaN.
    """
    check_arguments(search_layer_weights, locals())
    whole_number("trials", trials)
    if (options.get("allocation") or get_engine(options.get("target", "headprune")).allocation) == "uniform":
        raise InvalidInput("weights of layers change nothing where every layer loses the same share; take another allocation.")
    space = Space(replace(scores, spread=None), budget, options, error, trials, progress)
    weights = space.tried((0.0,) * len(scores))
    weights = steepest(space, weights)
    source = random.Random(seed)
    while not space.spent:
        found = next((found for found in neighbours(space, weights, source) if space.better(found, weights)), None)
        if found is None:
            break  # no two layers help
        weights = found
    log.info("%d plans tried; heads kept by layer %s, error %.4g -> %.4g", *space.summary())
    return LayerSearch(replace(space.plans[weights], scores=scores), tuple(space.trials))


class Space:
    """What has been tried so far, by weights and by plan."""

    def __init__(
        self,
        scores: HeadScores,
        budget: Budget,
        options: dict[str, Any],
        error: Fitness,
        most: int,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self.scores, self.budget, self.options, self.error, self.most = scores, budget, options, error, most
        self.progress = progress
        # Weights multiply what a head is above a number below the least, so that negative scores are weighed the right way round.
        reached = [found.min() for name, found in scores.items() if len(found) and name not in scores.unreached]
        self.least = 1.1 * min(0.0, *(float(found) for found in reached)) if reached else 0.0
        self.trials: list[Trial] = []
        self.plans: dict[tuple[float, ...], PruningPlan] = {}
        self.errors: dict[tuple[Any, ...], float] = {}

    @property
    def spent(self) -> bool:
        return len(self.trials) >= self.most

    def plan(self, weights: tuple[float, ...]) -> PruningPlan:
        if weights not in self.plans:
            values = {name: (found - self.least) * math.exp(weight) for (name, found), weight in zip(self.scores.items(), weights)}
            self.plans[weights] = plan(replace(self.scores, scores=values), self.budget, **self.options)
        return self.plans[weights]

    def heads(self, weights: tuple[float, ...], layer: int) -> tuple[int, ...]:
        return tuple(self.plan(weights).values())[layer]

    def is_new(self, weights: tuple[float, ...]) -> bool:
        return key_of(self.plan(weights)) not in self.errors

    def tried(self, weights: tuple[float, ...]) -> tuple[float, ...]:
        chosen = self.plan(weights)
        if key_of(chosen) not in self.errors:
            (found,) = self.error([chosen])
            if math.isnan(found):
                raise InvalidInput(
                    "the error of a plan is NaN; look for overflow in low precision (run in fp32) or NaN in what forward returns."
                )
            self.errors[key_of(chosen)] = found
            self.trials.append(Trial(tuple(len(heads) for heads in chosen.values()), weights, found))
            if self.progress:
                self.progress(len(self.trials), self.most)
        return weights

    def better(self, weights: tuple[float, ...], than: tuple[float, ...]) -> bool:
        self.tried(weights)
        return self.errors[key_of(self.plan(weights))] < self.errors[key_of(self.plan(than))]

    def summary(self) -> tuple[Any, ...]:
        best = min(self.trials, key=lambda trial: trial.error)
        return len(self.trials), best.kept, self.trials[0].error, best.error


def key_of(chosen: Mapping[str, Sequence[int]]) -> tuple[Any, ...]:
    return tuple(tuple(heads) for heads in chosen.values())


def steepest(space: Space, weights: tuple[float, ...]) -> tuple[float, ...]:
    """The best slope along the depth: doubled in the direction that helps while it does."""
    best, layers = weights, len(weights)
    for sign in (1.0, -1.0):
        slope = TILT * sign
        while not space.spent and abs(slope) <= STEEPEST:
            tilted = tuple(slope * layer / max(layers - 1, 1) for layer in range(layers))
            if not space.better(tilted, best):
                break
            best, slope = tilted, 2 * slope
        if best != weights:
            break
    return best


def neighbours(space: Space, weights: tuple[float, ...], source: random.Random) -> Iterator[tuple[float, ...]]:
    """Weights by which one layer has lost and another then got a head or as little as there is, if that plan was not tried."""
    moves = list(permutations(range(len(weights)), 2))
    source.shuffle(moves)
    for loses, gains in moves:
        if space.spent:
            return
        lowered = moved(space, weights, loses, -1.0)
        raised = None if lowered is None else moved(space, lowered, gains, 1.0)
        if raised is not None and space.is_new(raised):
            yield raised


def moved(space: Space, weights: tuple[float, ...], layer: int, sign: float) -> tuple[float, ...] | None:
    """`weights` with that of `layer` raised or lowered until its heads change; None where they do not."""
    before, step = space.heads(weights, layer), STEP
    while step <= STEEPEST:
        found = tuple(weight + sign * step * (at == layer) for at, weight in enumerate(weights))
        if space.heads(found, layer) != before:
            return found
        step *= GROWTH
    return None
