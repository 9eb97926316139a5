"""The arithmetic of pruning in several steps: everything is told in the original's heads and by the original's cost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from headprune.errors import unknown_name
from headprune.models import attention_sites
from headprune.nn.replace import own_attention
from headprune.planning import Budget
from headprune.scoring.site_shape import SiteShape

Keep = dict[str, tuple[int, ...]]
SLACK = 0.25  # of the smallest unit of cost, so that a float's rounding asks for neither more nor less


def shapes_of(model: nn.Module) -> dict[str, SiteShape]:
    """Site name -> its geometry, for every attention of `model`."""
    with own_attention(model):
        return {site.name: SiteShape.of(site) for site in attention_sites(model)}


def whole(shapes: Mapping[str, SiteShape]) -> Keep:
    """All heads of every site."""
    return {name: tuple(range(shape.head_map.query_heads)) for name, shape in shapes.items()}


def composed(earlier: Mapping[str, tuple[int, ...]], later: Mapping[str, Iterable[int]]) -> Keep:
    """What is left of the original when `later` numbers its heads as `earlier` left them."""
    return {name: tuple(heads[index] for index in later.get(name, range(len(heads)))) for name, heads in earlier.items()}


def relative_budget(budget: Budget, fraction: float, original: Mapping[str, SiteShape], now: Mapping[str, SiteShape]) -> Budget:
    """The budget that takes a model of shapes `now` to where `fraction` of the original's cost has gone."""
    full = whole_cost(budget, original)
    if budget.table is not None:
        budget = replace(budget, table=budget.table.of_pruned(original, now))
    left = whole_cost(budget, now)
    to_go = int(fraction * (full + budget.fixed_cost) + 1e-9) - (full - left)
    relative = 0.0 if to_go <= 0 else (to_go + SLACK) / max(left + budget.fixed_cost, 1)
    changed: dict[str, Any] = {budget.quantity: min(relative, 1 - 1e-9)}
    return replace(budget, **changed)


def whole_cost(budget: Budget, shapes: Mapping[str, SiteShape]) -> int:
    return sum(budget.cost(shape, shape.head_map, name) for name, shape in shapes.items())


def removed_fraction(budget: Budget, original: Mapping[str, SiteShape], keep: Mapping[str, tuple[int, ...]]) -> float:
    """Which share of the original's cost has gone."""
    full = whole_cost(budget, original)
    left = sum(budget.cost(shape, shape.head_map.keep(keep[name]), name) for name, shape in original.items())
    return (full - left) / max(full + budget.fixed_cost, 1)


def protected_now(protect: Any, keep: Mapping[str, tuple[int, ...]]) -> dict[str, list[int] | None]:
    """`protect` of `hp.plan`, given in the original's heads, in the numbers that they have now."""
    given = protect if isinstance(protect, Mapping) else dict.fromkeys([protect] if isinstance(protect, str) else protect)
    for name in given:
        if name not in keep:
            raise unknown_name("attention site in protect", name, keep)
    return {name: None if heads is None else [keep[name].index(head) for head in heads] for name, heads in given.items()}
