"""Budgets: how much of a model is to go."""

from __future__ import annotations

from dataclasses import dataclass, fields

from headprune.errors import InvalidInput
from headprune.head_map import HeadMap
from headprune.scoring.site_shape import SiteShape


@dataclass(frozen=True)
class Budget:
    """The fraction to remove, in [0, 1), of exactly one quantity; 0.5 takes half of it away.

    heads: query heads. params: the parameters of the attention projections that belong to heads; a shared key/value head's
    go only when its whole group has gone. kv_cache: key/value heads, weighted by their size (bytes of cache per token).
    Raises InvalidInput for a fraction outside [0, 1), or for none or several quantities.
    """

    heads: float | None = None
    params: float | None = None
    kv_cache: float | None = None

    def __post_init__(self) -> None:
        given = {field.name: getattr(self, field.name) for field in fields(self) if getattr(self, field.name) is not None}
        if len(given) != 1:
            known = ", ".join(field.name for field in fields(self))
            raise InvalidInput(f"a budget names exactly one of {known}; got {', '.join(given) or 'none'}.")
        ((name, fraction),) = given.items()
        if isinstance(fraction, bool) or not isinstance(fraction, (int, float)) or not 0 <= fraction < 1:
            raise InvalidInput(f"budget {name}={fraction}: expected the fraction to remove, at least 0 and below 1 (0.5 = half).")

    @property
    def quantity(self) -> str:
        return next(field.name for field in fields(self) if getattr(self, field.name) is not None)

    @property
    def fraction(self) -> float:
        return float(getattr(self, self.quantity))

    def cost(self, shape: SiteShape, head_map: HeadMap) -> int:
        """What `head_map` costs at a site of `shape`, in the budget's quantity."""
        return COSTS[self.quantity](shape, head_map)

    def to_json(self) -> dict[str, float]:
        return {self.quantity: self.fraction}

    def __str__(self) -> str:
        return f"{self.fraction:.0%} of {self.quantity} away"


COSTS = {
    "heads": lambda shape, head_map: head_map.query_heads,
    "params": lambda shape, head_map: shape.parameters(head_map),
    "kv_cache": lambda shape, head_map: head_map.kv_heads * (shape.head_dim + shape.value_dim),
}
