"""How a budget is spread over the layers: registered strategies over removable units."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from headprune.errors import InfeasibleBudget, unknown_name
from headprune.head_map import HeadMap
from headprune.planning.budget import Budget
from headprune.scoring.scores import HeadScores

log = logging.getLogger("headprune")


@dataclass(frozen=True)
class Unit:
    """What can be removed at once: one query head, or a whole key/value group."""

    site: str
    heads: tuple[int, ...]
    score: float

    @property
    def mean_score(self) -> float:
        return self.score / len(self.heads)


@dataclass
class Selection:
    """The heads that are still kept while units are taken away, and what they cost."""

    scores: HeadScores
    budget: Budget
    min_heads: int
    curves: Mapping[str, Sequence[float]] | None = None  # site -> loss increase with 0, 1, 2, ... heads gone
    floors: Mapping[str, int] = field(default_factory=dict)  # site -> heads that it keeps, where more than min_heads
    kept: dict[str, set[int]] = field(init=False)

    def __post_init__(self) -> None:
        self.kept = {name: set(range(shape.head_map.query_heads)) for name, shape in self.scores.shapes.items()}

    def may_remove(self, unit: Unit) -> bool:
        left = sum(len(heads) for heads in self.kept.values()) - len(unit.heads)
        return left > 0 and len(self.kept[unit.site]) - len(unit.heads) >= self.least(unit.site)

    def least(self, site: str) -> int:
        return max(self.min_heads, self.floors.get(site, 0))

    def remove(self, unit: Unit) -> None:
        self.kept[unit.site] -= set(unit.heads)

    def head_map(self, site: str) -> HeadMap:
        return self.scores.shapes[site].head_map.keep(self.kept[site])

    def cost(self, site: str) -> int:
        return self.budget.cost(self.scores.shapes[site], self.head_map(site), site)

    def curve(self, site: str) -> Sequence[float] | None:
        return None if self.curves is None else self.curves[site]

    def full_cost(self, site: str) -> int:
        shape = self.scores.shapes[site]
        return self.budget.cost(shape, shape.head_map, site)


Allocation = Callable[[Selection, list[Unit]], None]
_allocations: dict[str, Allocation] = {}


def allocation(name: str) -> Callable[[Allocation], Allocation]:
    """Registers a strategy: it removes units (sorted by score, lowest first) from the selection until the budget is met,
    and raises InfeasibleBudget where it cannot be."""

    def register(function: Allocation) -> Allocation:
        _allocations[name] = function
        return function

    return register


def allocations() -> dict[str, Allocation]:
    """Every allocation by name."""
    return dict(_allocations)


def get_allocation(name: str) -> Allocation:
    if name not in _allocations:
        raise unknown_name("allocation", name, _allocations)
    return _allocations[name]


@allocation("global")
def global_ranking(selection: Selection, units: list[Unit]) -> None:
    """All heads of the model in one ranking."""
    sites = list(selection.kept)
    refuse_infeasible(selection, sites, remove_lowest(selection, units, sites), budget_target(selection, sites))


@allocation("uniform")
def uniform(selection: Selection, units: list[Unit]) -> None:
    """The same fraction in every layer."""
    left = {site: remove_lowest(selection, [unit for unit in units if unit.site == site], [site]) for site in selection.kept}
    short = [site for site, cost in left.items() if cost > budget_target(selection, [site])]
    if short:  # the one that can spare least says what all can meet
        worst = min(short, key=lambda site: most_that_goes(selection, [site], left[site]))
        refuse_infeasible(selection, [worst], left[worst], budget_target(selection, [worst]))
    sites, cost = list(left), sum(left.values())
    if cost > budget_target(selection, sites):
        away = max(0, most_that_goes(selection, sites, cost))
        told = (100 * away, selection.budget.quantity, 100 * selection.budget.fraction)
        log.warning("uniform rounds down in each layer: %.3g%% of %s away, not %.3g%%", *told)


def remove_lowest(selection: Selection, units: list[Unit], sites: list[str]) -> int:
    """Removes units, lowest score first, until `sites` together cost no more than the budget leaves them, or nothing is left to
    remove: what they then cost."""
    target = budget_target(selection, sites)
    cost = sum(selection.cost(site) for site in sites)
    for unit in units:
        if cost <= target:
            break
        if selection.may_remove(unit):
            before = selection.cost(unit.site)
            selection.remove(unit)
            cost += selection.cost(unit.site) - before
    return cost


def budget_target(selection: Selection, sites: list[str]) -> int:
    """What `sites` may cost together at most; a fixed cost of the rest of the model is shared out by their full cost."""
    full, fixed = full_costs(selection, sites)
    # Rounded so that half of 7 heads is met by 3 of them, whatever the float says.
    return full - int(selection.budget.fraction * (full + fixed) + 1e-9)


def full_costs(selection: Selection, sites: list[str]) -> tuple[int, int]:
    """What `sites` cost before anything goes, and their share of the fixed cost."""
    full = sum(selection.full_cost(site) for site in sites)
    everything = sum(selection.full_cost(site) for site in selection.kept)
    return full, selection.budget.fixed_cost * full // max(everything, 1)


def most_that_goes(selection: Selection, sites: list[str], cost: int) -> float:
    """The fraction of the budget's quantity that is away where `sites` cost `cost`."""
    full, fixed = full_costs(selection, sites)
    return (full - cost) / max(full + fixed, 1)


def refuse_infeasible(selection: Selection, sites: list[str], cost: int, target: int) -> None:
    """InfeasibleBudget where `sites` cost `cost` at the least, more than `target`; it names the nearest budget that is met."""
    if cost <= target:
        return
    budget, full = selection.budget, sum(selection.full_cost(site) for site in sites)
    most = max(0, most_that_goes(selection, sites, cost))  # fewer heads may have been measured to take longer
    where = f"over {len(sites)} sites" if len(sites) > 1 else f"at {sites[0]}"
    unit, size = UNITS.get(budget.quantity, (budget.quantity, 1))
    least, whole, allowed = (f"{amount / size:.3g}" if size > 1 else str(amount) for amount in (cost, full, target))
    allowed = f"{allowed} allowed" if target >= 0 else "none allowed, as the rest of the model takes more than the budget"
    raise InfeasibleBudget(
        f"{budget} cannot be met: {least} of {whole} {unit} are left {where}, {allowed}. The nearest budget that can be met is "
        f"{budget.quantity}={math.floor(1e4 * most) / 1e4:g}; or lower min_heads (now {selection.min_heads}) or multiple_of, or "
        "protect less."
    )


# What costs are told in, and how many of the cost's own units that is.
UNITS = {"kv_cache": ("cache entries per token", 1), "flops": ("FLOPs", 1), "latency": ("ms", 10**6), "params": ("parameters", 1)}
