"""The best number of heads for every layer under a budget, by dynamic programming."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from headprune.planning.allocation import Selection, Unit, allocation, budget_target, refuse_infeasible

GRID = 10_000  # steps of the budget; where its quantity has no more than that, the result is exact


@dataclass(frozen=True)
class Option:
    """One way to leave a site: the heads removed, what it then costs and by how much the model is thought to suffer."""

    removed: frozenset[int]
    cost: int
    error: float


@allocation("optimal")
def optimal(selection: Selection, units: Sequence[Unit]) -> None:
    """Minimises the sum over layers of e_l(k_l) subject to sum c_l(k_l) <= budget.

    e_l is the layer's measured loss curve where the plan has one (`headprune.planning.sensitivity`), else the sum of the
    removed heads' scores, which must then be costs that add up (fisher, ablation, shapley, fisher_least_squares). Exact for budgets
    of up to 10 000 units (the costs' greatest common divisor), else each layer's cost is rounded up to 1/10 000 of the budget.
    """
    by_site: dict[str, list[Unit]] = defaultdict(list)
    for unit in units:
        by_site[unit.site].append(unit)
    options = {site: options_of(selection, site, by_site[site]) for site in selection.kept}
    target = budget_target(selection, list(selection.kept))
    refuse_infeasible(selection, list(selection.kept), least_cost(selection, options), target)
    chosen = cheapest(list(options.values()), target)
    if all(option.removed == selection.kept[site] for site, option in zip(options, chosen)):
        chosen = cheapest_with_a_head(selection, options, target)
    for site, option in zip(options, chosen):
        selection.kept[site] -= option.removed


def least_cost(selection: Selection, options: Mapping[str, Sequence[Option]]) -> int:
    """That of the cheapest choice that leaves some site a head."""
    least = {site: min(option.cost for option in found) for site, found in options.items()}
    with_a_head = (
        option.cost - least[site] for site, found in options.items() for option in found if option.removed != selection.kept[site]
    )
    return sum(least.values()) + min(with_a_head, default=0)


def cheapest_with_a_head(selection: Selection, options: Mapping[str, Sequence[Option]], target: int) -> list[Option]:
    """The best choice that leaves some site a head: the best of those that leave it to one site or another."""
    found = []
    for index, site in enumerate(options):
        own = [option for option in options[site] if option.removed != selection.kept[site]]
        sites = [*options.values()]
        sites[index] = own
        if own and sum(min(option.cost for option in each) for each in sites) <= target:
            found.append(cheapest(sites, target))
    return min(found, key=lambda choice: sum(option.error for option in choice))


def options_of(selection: Selection, site: str, units: Sequence[Unit]) -> list[Option]:
    """The site with its 0, 1, 2, ... lowest units gone."""
    curve = selection.curve(site)
    removed: set[int] = set()
    found, error = [], 0.0
    for unit in [None, *units]:
        if unit is not None:
            if len(selection.kept[site]) - len(removed) - len(unit.heads) < selection.least(site):
                continue
            removed |= set(unit.heads)
            error += unit.score
        kept = selection.kept[site] - removed
        cost = selection.budget.cost(selection.scores.shapes[site], selection.scores.shapes[site].head_map.keep(kept), site)
        found.append(Option(frozenset(removed), cost, error if curve is None else curve[len(removed)]))
    return found


def cheapest(sites: Sequence[Sequence[Option]], target: int) -> list[Option]:
    """One option for each site: the least total error whose total cost is at most `target`; some choice must fit."""
    unit = math.gcd(*(option.cost for options in sites for option in options)) or 1
    step = unit * max(1, math.ceil(target / unit / GRID))
    size = target // step + 1
    best = np.zeros(size)  # best[b]: least error of the sites so far at a cost of at most b steps
    chosen = []
    for options in sites:
        table = np.full((len(options), size), np.inf)
        for row, option in enumerate(options):
            cost = -(-option.cost // step)  # rounded up: the budget is never exceeded
            if cost < size:
                table[row, cost:] = best[: size - cost] + option.error
        chosen.append(table.argmin(axis=0))
        best = table.min(axis=0)
    if not np.isfinite(best[-1]):  # rounding left nothing that fits: the smallest choice does
        return [min(options, key=lambda option: (option.cost, option.error)) for options in sites]
    left, found = size - 1, []
    for options, rows in zip(reversed(sites), reversed(chosen)):
        option = options[int(rows[left])]
        left -= -(-option.cost // step)
        found.append(option)
    return found[::-1]
