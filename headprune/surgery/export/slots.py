"""How the heads of a layer can be laid out in equal groups without changing its output: pure arithmetic of head maps.

A key/value head whose group is larger than the new size is repeated for the rest of its group; a group that is smaller is
filled up with dead query heads, whose output columns are zero.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise, product

from headprune.head_map import HeadMap


@dataclass(frozen=True)
class Slots:
    """New heads and the old ones that they hold; None is a dead head (all zeros).

    query: for each new query head; kv: for each new key/value head. Groups are equal and in order.
    """

    query: tuple[int | None, ...]
    kv: tuple[int | None, ...]

    @property
    def head_map(self) -> HeadMap:
        return HeadMap.uniform(len(self.query), len(self.kv))

    @property
    def dead(self) -> int:
        return self.query.count(None)

    @property
    def repeated(self) -> int:
        """Key/value heads that hold what another one holds too."""
        living = [kv for kv in self.kv if kv is not None]
        return len(living) - len(set(living))


def kv_heads_needed(head_map: HeadMap, group: int) -> int:
    return sum(-(-size // group) for size in head_map.group_sizes)


def in_groups(head_map: HeadMap, group: int, kv_heads: int | None = None) -> Slots:
    """The heads of `head_map` in groups of `group`, followed by dead ones up to `kv_heads` (default: none)."""
    query: list[int | None] = []
    kv: list[int | None] = []
    for old, (start, stop) in enumerate(pairwise(head_map.group_offsets)):
        for first in range(start, stop, group):
            members = list(range(first, min(first + group, stop)))
            query += [*members, *[None] * (group - len(members))]
            kv.append(old)
    dead = (kv_heads or len(kv)) - len(kv)
    return Slots((*query, *[None] * (group * dead)), (*kv, *[None] * dead))


def cheapest(head_map: HeadMap, query_cost: int, kv_cost: int) -> Slots:
    """Equal groups at the fewest parameters, then the smallest cache; the layer as it is where they are equal already.
    A layer without heads gets one dead head.

    query_cost, kv_cost: parameters of one query head and of one key/value head.
    """
    if not head_map.query_heads:
        return Slots((None,), (None,))
    if head_map.is_uniform:
        return in_groups(head_map, head_map.group_sizes[0])

    def cost(group: int) -> tuple[int, int]:
        kv = kv_heads_needed(head_map, group)
        return kv * (group * query_cost + kv_cost), kv

    return in_groups(head_map, min(range(1, max(head_map.group_sizes) + 1), key=cost))


def common_counts(
    head_maps: Sequence[HeadMap], query_cost: int, kv_cost: int, most: HeadMap, allowed: Callable[[int, int], bool]
) -> tuple[int, int] | None:
    """(query heads, key/value heads), the same for all layers, at the fewest parameters, no more than `most` has; None
    where no pair is `allowed`."""
    pairs = []
    for group, kv in product(range(1, max(most.group_sizes) + 1), range(1, most.query_heads + 1)):
        fits = all(kv_heads_needed(head_map, group) <= kv for head_map in head_maps)
        if fits and group * kv <= most.query_heads:
            pairs.append((kv * (group * query_cost + kv_cost), kv, group))
    return next(((group * kv, kv) for _, kv, group in sorted(pairs) if allowed(group * kv, kv)), None)
