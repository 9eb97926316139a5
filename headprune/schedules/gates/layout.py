"""Which gates there are: one for each head, or for each group of heads that goes at once, and what each costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from headprune.planning import Budget
from headprune.planning.allocation import Unit
from headprune.scoring import HeadScores
from headprune.scoring.site_shape import SiteShape


@dataclass(frozen=True)
class GateLayout:
    """units: what each gate opens. shapes: of all sites. fixed: units that stay open. goal: the share of the cost that may stay."""

    units: tuple[Unit, ...]
    shapes: dict[str, SiteShape]
    fixed: frozenset[int]
    budget: Budget

    @classmethod
    def of(
        cls, shapes: Mapping[str, SiteShape], budget: Budget, granularity: str, protected: Mapping[str, Sequence[int]]
    ) -> GateLayout:
        """protected: site -> heads that must stay."""
        units = tuple(Unit(name, heads, 0.0) for name, shape in shapes.items() for heads in heads_at_once(shape, granularity))
        fixed = frozenset(index for index, unit in enumerate(units) if set(unit.heads) & set(protected.get(unit.site, ())))
        return cls(units, dict(shapes), fixed, budget)

    def __len__(self) -> int:
        return len(self.units)

    @cached_property
    def costs(self) -> Tensor:
        """[units], fp32: the share of all heads' cost that falls to each; a site's cost is spread over its heads alike."""
        full = {name: self.budget.cost(shape, shape.head_map, name) for name, shape in self.shapes.items()}
        heads = {name: shape.head_map.query_heads for name, shape in self.shapes.items()}
        costs = torch.tensor([full[unit.site] * len(unit.heads) / heads[unit.site] for unit in self.units])
        return costs / costs.sum()

    @property
    def goal(self) -> float:
        """The share of the heads' cost that stays in the end."""
        full = sum(self.budget.cost(shape, shape.head_map, name) for name, shape in self.shapes.items())
        return 1 - int(self.budget.fraction * (full + self.budget.fixed_cost) + 1e-9) / max(full, 1)

    @cached_property
    def free(self) -> Tensor:
        """[units], bool: which may be closed."""
        return torch.tensor([index not in self.fixed for index in range(len(self.units))])

    @cached_property
    def _unit_of_head(self) -> dict[str, Tensor]:
        owner = {name: torch.zeros(shape.head_map.query_heads, dtype=torch.long) for name, shape in self.shapes.items()}
        for index, unit in enumerate(self.units):
            owner[unit.site][list(unit.heads)] = index
        return owner

    def by_site(self, values: Tensor) -> dict[str, Tensor]:
        """Site name -> [query_heads], of one value per unit [units]; differentiable."""
        return {name: values[owner.to(values.device)] for name, owner in self._unit_of_head.items()}

    def scores(self, name: str, values: Tensor) -> HeadScores:
        """Head scores out of one value per unit; a group's is spread over its heads, whose sum a plan reads."""
        shares = values.detach().float().cpu() / torch.tensor([len(unit.heads) for unit in self.units])
        return HeadScores(name, self.by_site(shares), dict(self.shapes))


def heads_at_once(shape: SiteShape, granularity: str) -> list[tuple[int, ...]]:
    """The query heads of each group, or (granularity "query_head") each by itself."""
    if granularity == "query_head":
        return [(head,) for head in range(shape.head_map.query_heads)]
    return [tuple(range(start, stop)) for start, stop in pairwise(shape.head_map.group_offsets) if stop > start]
