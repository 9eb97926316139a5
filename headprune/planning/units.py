"""What can be removed at once: query heads, groups, or one head of each group, joined where only some counts are allowed."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

from headprune.planning.allocation import Unit
from headprune.planning.engine import Engine
from headprune.scoring.scores import HeadScores
from headprune.scoring.site_shape import SiteShape

GRANULARITIES = ("query_head", "kv_group")


def removable_units(
    scores: HeadScores, name: str, engine: Engine, granularity: str, protected: set[int], multiple_of: int
) -> list[Unit]:
    """The units of site `name` that hold none of its `protected` heads, and leave only counts that `engine` allows."""
    shape, values = scores.shapes[name], scores[name].tolist()
    offsets = shape.head_map.group_offsets
    groups = [tuple(range(start, stop)) for start, stop in pairwise(offsets) if stop > start]
    if granularity == "query_head" and not engine.even_groups:
        groups = [(head,) for head in range(shape.head_map.query_heads)]
    elif granularity == "query_head":
        groups = one_of_each(groups, values, protected)
    units = [Unit(name, heads, sum(values[head] for head in heads)) for heads in groups if not protected & set(heads)]
    if multiple_of == 1 and not engine.divides_hidden:
        return units
    return chunks(shape, units, lambda left: engine.allows(shape, left, multiple_of, granularity == "kv_group"))


def one_of_each(groups: list[tuple[int, ...]], values: list[float], protected: set[int]) -> list[tuple[int, ...]]:
    """The lowest query head of every group, then the second lowest of every group, ...: groups of one size stay so, and all
    key/value heads stay. Groups of one head each remain units of their own, which take their key/value head along."""
    if all(len(group) == 1 for group in groups):
        return groups
    ranked = [sorted(group, key=lambda head: (head in protected, values[head], head)) for group in groups]
    return [tuple(sorted(heads)) for heads in zip(*ranked)]


def chunks(shape: SiteShape, units: list[Unit], allowed: Callable[[int], bool]) -> list[Unit]:
    """The units of one site joined, lowest first, so that after each the site has a number of heads that is `allowed`."""
    found, heads, score = [], [], 0.0
    for unit in sorted(units, key=lambda unit: (unit.mean_score, unit.heads)):
        heads, score = heads + list(unit.heads), score + unit.score
        if allowed(shape.head_map.query_heads - sum(len(one.heads) for one in found) - len(heads)):
            found.append(Unit(unit.site, tuple(heads), score))
            heads, score = [], 0.0
    # A chunk goes only with those before it: their mean scores must not fall.
    for number in range(len(found) - 1, 0, -1):
        before, after = found[number - 1], found[number]
        if after.mean_score < before.mean_score:
            found[number - 1 : number + 1] = [Unit(before.site, before.heads + after.heads, before.score + after.score)]
    return found
