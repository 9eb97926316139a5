"""What a criterion is, and the registry of all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import Tensor

from headprune.errors import unknown_name
from headprune.scoring.observations import Need, SiteObservations


@dataclass(frozen=True)
class Criterion:
    """A pure function of one site's observations: [query_heads], fp32, higher = keep."""

    name: str
    needs: frozenset[Need]
    source: str
    cost: str
    function: Callable[[SiteObservations], Tensor]

    @property
    def summary(self) -> str:
        return (self.function.__doc__ or "").strip().split("\n")[0]


_criteria: dict[str, Criterion] = {}


def criterion(name: str, *, needs: Iterable[Need], source: str, cost: str) -> Callable:
    """Registers the decorated function as a criterion; a later one of the same name takes the earlier one's place."""

    def register(function: Callable[[SiteObservations], Tensor]) -> Callable[[SiteObservations], Tensor]:
        _criteria[name] = Criterion(name, frozenset(needs), source, cost, function)
        return function

    return register


def criteria() -> dict[str, Criterion]:
    """Every criterion by name."""
    return dict(sorted(_criteria.items()))


def get_criterion(name: str) -> Criterion:
    if name not in _criteria:
        raise unknown_name("criterion", name, _criteria)
    return _criteria[name]
