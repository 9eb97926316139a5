"""From scores and a budget to a plan."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from itertools import pairwise

from headprune.errors import InvalidInput, unknown_name
from headprune.planning.allocation import Selection, Unit, get_allocation
from headprune.planning.budget import Budget
from headprune.planning.pruning_plan import PruningPlan
from headprune.planning.sensitivity import Sensitivity
from headprune.scoring.scores import HeadScores
from headprune.scoring.stability import unsettled_heads

log = logging.getLogger("headprune")
UNSETTLED = 0.15  # of all heads
GRANULARITIES = ("query_head", "kv_group")


def plan(
    scores: HeadScores,
    budget: Budget,
    *,
    allocation: str = "global",
    granularity: str = "query_head",
    min_heads: int = 1,
    protect: Mapping[str, Iterable[int] | None] | Iterable[str] = (),
    multiple_of: int = 1,
    sensitivity: Sensitivity | None = None,
) -> PruningPlan:
    """Which heads to keep so that `budget` is met and the lowest scores go.

    Args:
        allocation: "global" ranks all heads together, "uniform" takes the same fraction of every layer, "optimal" finds the counts
            per layer that lose least by dynamic programming.
        granularity: "query_head" removes query heads one by one and leaves ragged groups; "kv_group" removes a key/value
            head with all its query heads, so that groups stay equal.
        min_heads: query heads that every site keeps at least; with 0 whole attentions may go, though never all of them.
        protect: sites that lose nothing, or a mapping of site -> heads that must stay (None: all of them).
        multiple_of: every site that loses heads keeps a multiple of this many.
        sensitivity: measured loss curves (`hp.sensitivity`) that "optimal" reads in place of sums of scores.

    Raises InfeasibleBudget where the constraints leave too little to remove; InvalidInput for unknown names.
    """
    if granularity not in GRANULARITIES:
        raise unknown_name("granularity", granularity, GRANULARITIES)
    if min_heads < 0:
        raise InvalidInput(f"min_heads is {min_heads}; give 0 (whole attentions may go) or more.")
    protected = protected_heads(scores, protect)
    for name in scores.unreached:
        protected[name] = set(range(scores.shapes[name].head_map.query_heads))
    if multiple_of < 1:
        raise InvalidInput(f"multiple_of is {multiple_of}; give 1 or more.")
    units = [unit for unit in removable_units(scores, granularity) if not protected[unit.site] & set(unit.heads)]
    if multiple_of > 1:
        units = [chunk for name in scores for chunk in chunks(scores, [one for one in units if one.site == name], multiple_of)]
    curves = None if sensitivity is None else sensitivity.costs(scores)
    selection = Selection(scores, budget, min_heads, curves)
    # Equal scores go by position, so that a plan does not depend on the order of a hash.
    order = {name: index for index, name in enumerate(scores)}
    get_allocation(allocation)(
        selection, sorted(units, key=lambda unit: (unit.score / len(unit.heads), order[unit.site], unit.heads))
    )
    keep = {name: tuple(sorted(heads)) for name, heads in selection.kept.items()}
    warn_of_unsettled(scores, keep)
    return PruningPlan(keep, dict(scores.shapes), budget, scores.criterion, scores)


def warn_of_unsettled(scores: HeadScores, keep: Mapping[str, Iterable[int]]) -> None:
    count = sum(len(heads) for heads in unsettled_heads(scores, keep).values())
    total = sum(shape.head_map.query_heads for shape in scores.shapes.values())
    if count > UNSETTLED * total:
        log.warning(
            "too few calibration samples to rank the heads near the cut: %d of %d might fall on its other side with others",
            count,
            total,
        )


def removable_units(scores: HeadScores, granularity: str) -> list[Unit]:
    units = []
    for name, shape in scores.shapes.items():
        if granularity == "query_head":
            groups = [(head,) for head in range(shape.head_map.query_heads)]
        else:
            offsets = shape.head_map.group_offsets
            groups = [tuple(range(start, stop)) for start, stop in pairwise(offsets) if stop > start]
        values = scores[name].tolist()
        units += [Unit(name, heads, sum(values[head] for head in heads)) for heads in groups]
    return units


def chunks(scores: HeadScores, units: list[Unit], multiple_of: int) -> list[Unit]:
    """The units of one site joined, lowest first, so that after each the site has a multiple of `multiple_of` heads."""
    found, heads, score = [], [], 0.0
    for unit in sorted(units, key=lambda unit: (unit.mean_score, unit.heads)):
        heads, score = heads + list(unit.heads), score + unit.score
        gone = sum(len(one.heads) for one in found) + len(heads)
        if (scores.shapes[unit.site].head_map.query_heads - gone) % multiple_of == 0:
            found.append(Unit(unit.site, tuple(heads), score))
            heads, score = [], 0.0
    # A chunk goes only with those before it: their mean scores must not fall.
    for number in range(len(found) - 1, 0, -1):
        before, after = found[number - 1], found[number]
        if after.mean_score < before.mean_score:
            found[number - 1 : number + 1] = [Unit(before.site, before.heads + after.heads, before.score + after.score)]
    return found


def protected_heads(scores: HeadScores, protect: Mapping[str, Iterable[int] | None] | Iterable[str]) -> dict[str, set[int]]:
    given = protect if isinstance(protect, Mapping) else dict.fromkeys([protect] if isinstance(protect, str) else protect)
    protected: dict[str, set[int]] = {name: set() for name in scores}
    for name, heads in given.items():
        if name not in protected:
            raise unknown_name("attention site in protect", name, protected)
        head_map = scores.shapes[name].head_map
        protected[name] = set(range(head_map.query_heads)) if heads is None else set(head_map.checked(heads))
    return protected
