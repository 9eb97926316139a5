"""What can be removed at once: query heads, groups, or steps from one layout that an engine can run to the next."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise

from headprune.head_map import HeadMap
from headprune.planning.allocation import Unit
from headprune.planning.engine import Engine
from headprune.scoring.scores import HeadScores
from headprune.scoring.site_shape import SiteShape

GRANULARITIES = ("query_head", "kv_group")


def removable_units(
    scores: HeadScores, name: str, engine: Engine, granularity: str, protected: set[int], multiple_of: int, least: int
) -> list[Unit]:
    """The units of site `name`, lowest first, without its `protected` heads; they leave only counts that `engine` allows.

    Where a unit counts on those before it to have gone, they end where `least` heads would no longer be left, so that none is
    skipped.
    """
    shape, values = scores.shapes[name], scores[name].tolist()
    groups = [tuple(range(start, stop)) for start, stop in pairwise(shape.head_map.group_offsets) if stop > start]
    ordered = multiple_of > 1 or engine.divides_hidden
    stay = shape.head_map.kv_stay  # a group without query heads would still be there, smaller than the others
    if engine.even_groups and (stay or (granularity == "query_head" and len(groups) < len(values))):
        steps, ordered = even_steps(groups, values, protected, whole_groups=not engine.alike and not stay, last=stay), True
    else:
        single = [(head,) for head in range(len(values))]
        steps = [heads for heads in (single if granularity == "query_head" else groups) if not protected & set(heads)]
        steps.sort(key=lambda heads: sum(values[head] for head in heads) / len(heads))
    units = [Unit(name, heads, sum(values[head] for head in heads)) for heads in steps]
    return in_order(shape, units, least, lambda left: engine.allows(shape, left, multiple_of)) if ordered else units


def even_steps(
    groups: Iterable[tuple[int, ...]], values: Sequence[float], protected: set[int], *, whole_groups: bool, last: bool = False
) -> list[tuple[int, ...]]:
    """Steps that keep groups of one size: each takes one head of every group or, with `whole_groups`, a group, whichever scores
    lower per head; with `last` also the last head of every group. They end where a protected head would go.

    groups: the query heads of each key/value head, equally many.
    """
    left = [sorted(group, key=lambda head: (head in protected, values[head], head)) for group in groups]
    found = []

    def mean(heads: Sequence[int]) -> tuple[float, int]:
        return sum(values[head] for head in heads) / len(heads), -len(heads)

    while left:
        slices = [[group[0] for group in left]] if last or len(left[0]) > 1 else []
        steps = [*left, *slices] if whole_groups else slices
        choices = [heads for heads in steps if not protected & set(heads)]
        if not choices:
            break
        cheapest = min(choices, key=mean)
        gone = set(cheapest)
        found.append(tuple(sorted(gone)))
        left = [rest for group in left if (rest := [head for head in group if head not in gone])]
    return found


def in_order(shape: SiteShape, units: Sequence[Unit], least: int, allowed: Callable[[HeadMap], bool]) -> list[Unit]:
    """The units of one site joined so that what each leaves is `allowed`, and that their mean scores do not fall: sorted by
    those, none then goes before the one that it counts on."""
    found: list[Unit] = []
    left, score = set(range(shape.head_map.query_heads)), 0.0
    heads: tuple[int, ...] = ()
    for unit in units:
        left -= set(unit.heads)
        heads, score = (*heads, *unit.heads), score + unit.score
        if len(left) < least:
            break
        if not allowed(shape.head_map.keep(left)):
            continue
        joined, heads, score = Unit(unit.site, heads, score), (), 0.0
        while found and joined.mean_score < found[-1].mean_score:
            before = found.pop()
            joined = Unit(before.site, (*before.heads, *joined.heads), before.score + joined.score)
        found.append(joined)
    return found
