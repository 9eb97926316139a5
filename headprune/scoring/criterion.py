"""What a criterion is, and the registry of all of them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from typing import TypeVar, cast

from torch import Tensor

from headprune.arguments import check_arguments
from headprune.errors import InvalidInput, unknown_name
from headprune.scoring.observations import Need, Observations, SiteObservations

log = logging.getLogger("headprune")
ENTRY_POINTS = "headprune.criteria"
OfSite = Callable[[SiteObservations], Tensor]
OfModel = Callable[[Observations], Mapping[str, Tensor]]
Function = TypeVar("Function", bound=OfSite | OfModel)


@dataclass(frozen=True)
class Criterion:
    """A pure function of what was observed: [query_heads] of a site, fp32, higher = keep; from the observations of that site
    alone, or (whole_model) from those of all sites at once."""

    name: str
    needs: frozenset[Need]
    source: str
    cost: str
    function: OfSite | OfModel
    whole_model: bool = False

    @property
    def summary(self) -> str:
        return (self.function.__doc__ or "").strip().split("\n")[0]

    def scores(self, observed: Observations) -> dict[str, Tensor]:
        """Site name -> [query_heads], fp32. Raises InvalidInput where a need was not observed."""
        self.check_observed(observed)
        if self.whole_model:
            found = cast(OfModel, self.function)(observed)
            return {name: found[name].float() for name in observed}
        of_site = cast(OfSite, self.function)
        return {name: of_site(site).float() for name, site in observed.items()}

    def check_observed(self, observed: Observations) -> None:
        for need in self.needs:
            missing = [name for name, site in observed.items() if not site.has(need)]
            if missing:
                raise InvalidInput(
                    f"{self.name} needs {need.value}, which was not observed at {missing[0]}; observe with needs={{{need}}}."
                )


_criteria: dict[str, Criterion] = {}


def criterion(
    name: str, *, needs: Iterable[Need], source: str, cost: str, whole_model: bool = False
) -> Callable[[Function], Function]:
    """Registers the decorated function as a criterion; a later one of the same name takes the earlier one's place.

    The function gives a site's scores, [query_heads], higher = keep, from what was observed there (SiteObservations); with
    whole_model a dict of them, by site, from the Observations of all sites.

    Args:
        needs: what must be observed. source: the paper and equation. cost: in passes over the data. The latter two are told
            by `headprune criteria`.

    A package that is installed beside headprune names its module in the entry point group "headprune.criteria".
    """

    def register(function: Function) -> Function:
        _criteria[name] = Criterion(name, needed, source, cost, function, whole_model)
        return function

    check_arguments(criterion, locals())
    needed = frozenset(Need.of(need) for need in needs)
    return register


def criteria() -> dict[str, Criterion]:
    """Every criterion by name."""
    load_entry_points()
    return dict(sorted(_criteria.items()))


def get_criterion(name: str) -> Criterion:
    """The criterion of this name, those of installed packages included. Raises InvalidInput where there is none."""
    if name not in _criteria:
        load_entry_points()
    if name not in _criteria:
        raise unknown_name("criterion", name, _criteria)
    return _criteria[name]


@cache
def load_entry_points() -> None:
    """Imports what other installed packages registered, once; one that fails is named and left out."""
    for entry in entry_points(group=ENTRY_POINTS):
        try:
            entry.load()
        except Exception as error:
            log.warning("criteria of %s (%s) were left out: %s", entry.name, entry.value, error)
