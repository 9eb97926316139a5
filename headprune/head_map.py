"""Which key/value head each query head reads: the one place that knows the arithmetic of ragged groups."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from operator import index
from typing import Any

from headprune.errors import InvalidInput


@dataclass(frozen=True)
class HeadMap:
    """The head layout of one attention layer; immutable, hashable.

    `kv_of_query[h]` is the key/value head that query head `h` reads, non-decreasing, so that the query heads of one
    group are neighbours. A layer is *ragged* when its groups differ in size. A layer may have no heads at all.

    kv_stay: its key/value heads are another layer's too (it reads them there, or others read them here), so that all of them
    stay, whatever query heads go: groups may then be empty.

    Raises InvalidInput where an index is out of range or the order decreases.
    """

    kv_of_query: tuple[int, ...]
    kv_heads: int
    kv_stay: bool = False

    def __post_init__(self) -> None:
        try:
            kv_of_query, kv_heads = tuple(index(kv) for kv in self.kv_of_query), index(self.kv_heads)
        except TypeError:
            raise InvalidInput(
                f"HeadMap({self.kv_of_query!r:.80}, {self.kv_heads!r:.80}): expected the key/value head that each query head "
                "reads, and how many there are, such as HeadMap((0, 0, 1), 2)."
            ) from None
        object.__setattr__(self, "kv_of_query", kv_of_query)
        object.__setattr__(self, "kv_heads", kv_heads)
        if kv_heads < 0:
            raise InvalidInput(f"kv_heads is {kv_heads}; it must be 0 or more.")
        previous = 0
        for head, kv in enumerate(self.kv_of_query):
            if not 0 <= kv < self.kv_heads:
                raise InvalidInput(
                    f"query head {head} reads key/value head {kv}, but there are {self.kv_heads} (0..{self.kv_heads - 1})."
                )
            if kv < previous:
                raise InvalidInput(
                    f"kv_of_query must not decrease: query head {head} reads {kv} after {previous}. "
                    "Reorder the query heads so that those of one group are neighbours."
                )
            previous = kv

    @classmethod
    def uniform(cls, query_heads: int, kv_heads: int | None = None) -> HeadMap:
        """`query_heads` spread evenly over `kv_heads` (default: one each, plain multi-head attention)."""
        kv_heads = query_heads if kv_heads is None else kv_heads
        if query_heads == 0:
            return cls((), 0)
        try:
            even = index(query_heads) > 0 and index(kv_heads) > 0 and query_heads % kv_heads == 0
        except TypeError:
            even = False
        if not even:
            raise InvalidInput(
                f"{query_heads!r:.80} query heads cannot be spread evenly over {kv_heads!r:.80} key/value heads; "
                "give HeadMap(kv_of_query, kv_heads) for a ragged layer."
            )
        group = query_heads // kv_heads
        return cls(tuple(head // group for head in range(query_heads)), kv_heads)

    @property
    def query_heads(self) -> int:
        """How many query heads there are."""
        return len(self.kv_of_query)

    @cached_property
    def group_sizes(self) -> tuple[int, ...]:
        """Number of query heads that read each key/value head."""
        sizes = [0] * self.kv_heads
        for kv in self.kv_of_query:
            sizes[kv] += 1
        return tuple(sizes)

    @cached_property
    def group_offsets(self) -> tuple[int, ...]:
        """CSR offsets, [kv_heads + 1]: group `g` is the query heads `offsets[g]` up to `offsets[g + 1]`."""
        offsets = [0]
        for size in self.group_sizes:
            offsets.append(offsets[-1] + size)
        return tuple(offsets)

    @property
    def is_uniform(self) -> bool:
        """True where all groups have the same size, so that stock attention kernels can run the layer."""
        return len(set(self.group_sizes)) <= 1

    def kept_kv_heads(self, query_heads: Iterable[int]) -> tuple[int, ...]:
        """The key/value heads that stay with `query_heads`, ascending: those that one of them reads, or all (`kv_stay`)."""
        read = {self.kv_of_query[head] for head in self.checked(query_heads)}
        return tuple(range(self.kv_heads)) if self.kv_stay else tuple(sorted(read))

    def keep(self, query_heads: Iterable[int]) -> HeadMap:
        """The map that is left when only `query_heads` stay; key/value heads that nobody reads any more go (see `kv_stay`)."""
        kept = self.checked(query_heads)
        kv = self.kept_kv_heads(kept)
        renumbered = {old: new for new, old in enumerate(kv)}
        return HeadMap(tuple(renumbered[self.kv_of_query[head]] for head in kept), len(kv), self.kv_stay)

    def checked(self, query_heads: Iterable[int]) -> tuple[int, ...]:
        """`query_heads` sorted; InvalidInput where they are no integers, one is out of range or named twice."""
        heads = sorted(integers(query_heads))
        for head in heads:
            if not 0 <= head < self.query_heads:
                raise InvalidInput(f"query head {head} does not exist: there are {self.query_heads} (0..{self.query_heads - 1}).")
        if len(set(heads)) != len(heads):
            twice = sorted({head for head in heads if heads.count(head) > 1})
            raise InvalidInput(f"query heads {twice} are named more than once.")
        return tuple(heads)

    def to_json(self) -> dict[str, Any]:
        stay = {"kv_stay": True} if self.kv_stay else {}
        return {"kv_of_query": list(self.kv_of_query), "kv_heads": self.kv_heads, **stay}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> HeadMap:
        return cls(tuple(content["kv_of_query"]), content["kv_heads"], content.get("kv_stay", False))

    def __str__(self) -> str:
        if not self.query_heads:
            return "no heads"
        if self.is_uniform:
            return f"{self.query_heads}q/{self.kv_heads}kv"
        return f"{self.query_heads}q/{self.kv_heads}kv ragged {'+'.join(map(str, self.group_sizes))}"


def integers(heads: Iterable[int]) -> list[int]:
    """`heads` as they are, of any integer type. A mask is refused: its True and False would pass for heads 1 and 0."""
    try:
        found = list(heads)
        if any("bool" in str(getattr(head, "dtype", type(head))) for head in found):
            raise TypeError
        return [index(head) for head in found]
    except TypeError:
        raise InvalidInput(f"query heads are {heads!r:.100}; expected the numbers of the heads, such as [0, 2, 3].") from None
