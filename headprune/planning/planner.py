"""From scores and a budget to a plan."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from headprune.arguments import check_arguments
from headprune.errors import InvalidInput, unknown_name, whole_number
from headprune.planning.allocation import Selection, Unit, get_allocation
from headprune.planning.budget import Budget
from headprune.planning.engine import get_engine, refuse_conflicts
from headprune.planning.pruning_plan import PruningPlan
from headprune.planning.sensitivity import Sensitivity
from headprune.planning.units import GRANULARITIES, removable_units
from headprune.scoring.scores import HeadScores
from headprune.scoring.site_shape import SiteShape
from headprune.scoring.stability import unsettled_heads

log = logging.getLogger("headprune")
UNSETTLED = 0.15  # of all heads


def plan(
    scores: HeadScores,
    budget: Budget,
    *,
    allocation: str | None = None,
    granularity: str | None = None,
    min_heads: int = 1,
    protect: Mapping[str, Iterable[int] | None] | Iterable[str] | str = (),
    multiple_of: int = 1,
    sensitivity: Sensitivity | None = None,
    target: str = "headprune",
) -> PruningPlan:
    """Which heads to keep so that `budget` is met and the lowest scores go.

    Args:
        allocation: "global" (the default) ranks all heads together, "uniform" takes the same fraction of every layer, "optimal"
            finds the counts per layer that lose least by dynamic programming.
        granularity: "query_head" removes query heads one by one and leaves ragged groups; "kv_group" removes a key/value head with
            all its query heads, so that groups stay equal. The default is "kv_group" for a kv_cache budget, as nothing of the
            cache goes before the last head of a group, else (and with `sensitivity`) "query_head".
        min_heads: query heads that every site keeps at least; with 0 whole attentions may go, though never all of them.
        protect: sites that lose nothing, or a mapping of site -> heads that must stay (None: all of them).
        multiple_of: every site that loses heads keeps a multiple of this many.
        sensitivity: measured loss curves (`headprune.planning.sensitivity`) that "optimal" reads in place of sums of scores, where
            heads go one by one in the order of the scores.
        target: where the model will run, which constrains the plan: "headprune" (anything goes), "llama.cpp" (equal groups, a head
            in layer 0), "vllm" (equal groups, a head in every layer; multiple_of holds for key/value heads too, for tensor
            parallelism), "stock" (all layers alike, so allocation is "uniform"). With equal groups "query_head" takes one head of
            every group or (not for "stock") a whole group at a time.

    Raises InfeasibleBudget where the constraints leave too little to remove; InvalidInput for unknown names and for what
    contradicts the target.
    """
    check_scores_and_budget(scores, budget)
    whole_number("min_heads", min_heads, least=0)
    whole_number("multiple_of", multiple_of)
    check_arguments(plan, locals())
    engine = get_engine(target)
    allocation = allocation or engine.allocation
    granularity = granularity_for(granularity, budget, one_by_one=sensitivity is not None)
    refuse_conflicts(engine, scores, allocation, min_heads)
    if sensitivity is not None and allocation != "optimal":
        raise InvalidInput(f'sensitivity is given, which allocation="{allocation}" does not read; plan with allocation="optimal".')
    protected = protected_heads(scores, protect)
    for name in scores.unreached:
        protected[name] = set(range(scores.shapes[name].head_map.query_heads))
    curves = None if sensitivity is None else sensitivity.costs(scores)
    selection = Selection(scores, budget, min_heads, curves, engine.floors(list(scores)))
    units = [
        unit
        for name in scores
        if saves(budget, scores.shapes[name], name)
        for unit in removable_units(scores, name, engine, granularity, protected[name], multiple_of, selection.least(name))
    ]
    if sensitivity is not None:
        refuse_other_steps(sensitivity, units)
    # Equal scores go by position, so that a plan does not depend on the order of a hash: sites as they come, their units in order.
    get_allocation(allocation)(selection, sorted(units, key=lambda unit: unit.mean_score))
    keep = {name: tuple(sorted(heads)) for name, heads in selection.kept.items()}
    warn_of_unsettled(scores, keep)
    return PruningPlan(keep, dict(scores.shapes), budget, scores.criterion, scores, scores.made_for)


def refuse_other_steps(sensitivity: Sensitivity, units: Iterable[Unit]) -> None:
    """InvalidInput where other heads would go than those whose loss was measured."""
    gone: dict[str, set[int]] = {}
    for unit in units:
        heads = gone.setdefault(unit.site, set())
        heads |= set(unit.heads)
        if heads != set(sensitivity.order[unit.site][: len(heads)]):
            raise InvalidInput(
                f"at {unit.site} heads {sorted(heads)} would be the first to go, and the sensitivity has measured heads "
                f"{sorted(sensitivity.order[unit.site][: len(heads)])}: its curves are of heads one by one in the order of scores. "
                "Leave out protect, granularity or target, or the sensitivity."
            )


def saves(budget: Budget, shape: SiteShape, site: str) -> bool:
    """Whether anything of what the budget counts goes with the heads of such a site (of the cache nothing, where its keys and
    values are other layers' too)."""
    return budget.cost(shape, shape.head_map.keep(()), site) < budget.cost(shape, shape.head_map, site)


def check_scores_and_budget(scores: Any, budget: Any) -> None:
    if not isinstance(scores, HeadScores):
        several = f", such as those by {next(iter(scores))!r} of the given dict" if isinstance(scores, Mapping) and scores else ""
        raise InvalidInput(f"scores is {scores!r:.80}; expected the HeadScores of one criterion, as hp.score gives them{several}.")
    if not isinstance(budget, Budget):
        raise InvalidInput(f"the budget is {budget!r:.80}; expected what is to be removed, such as hp.Budget(heads=0.5).")
    if budget.quantity == "latency":
        budget.measured().refuse_other_model(scores)


def granularity_for(granularity: str | None, budget: Budget, one_by_one: bool = False) -> str:
    """The one that is asked for, or what suits the budget: heads that go from a group which stays free nothing of the cache.

    one_by_one: heads must go so, as their loss was measured so.
    """
    found = granularity or ("kv_group" if budget.quantity == "kv_cache" and not one_by_one else "query_head")
    if found not in GRANULARITIES:
        raise unknown_name("granularity", found, GRANULARITIES)
    return found


def warn_of_unsettled(scores: HeadScores, keep: Mapping[str, Sequence[int]]) -> None:
    count = sum(len(heads) for heads in unsettled_heads(scores, keep).values())
    total = sum(shape.head_map.query_heads for shape in scores.shapes.values())
    if count > UNSETTLED * total:
        log.warning(
            "too few calibration samples to rank the heads near the cut: %d of %d might fall on its other side with others",
            count,
            total,
        )


def protected_heads(scores: HeadScores, protect: Mapping[str, Iterable[int] | None] | Iterable[str] | str) -> dict[str, set[int]]:
    given = protect if isinstance(protect, Mapping) else dict.fromkeys([protect] if isinstance(protect, str) else protect)
    protected: dict[str, set[int]] = {name: set() for name in scores}
    for name, heads in given.items():
        if name not in protected:
            raise unknown_name("attention site in protect", name, protected)
        head_map = scores.shapes[name].head_map
        protected[name] = set(range(head_map.query_heads)) if heads is None else set(head_map.checked(heads))
    return protected
