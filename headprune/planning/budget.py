"""Budgets: how much of a model is to go."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

from headprune.arguments import check_arguments
from headprune.errors import InvalidInput, whole_number
from headprune.head_map import HeadMap
from headprune.planning.latency_table import LatencyTable
from headprune.scoring.site_shape import SiteShape


@dataclass(frozen=True)
class Budget:
    """The fraction to remove, in [0, 1), of exactly one quantity; 0.5 takes half of it away.

    heads: query heads. params: the parameters of the attention projections that belong to heads; a shared key/value head's
    go only when its whole group has gone. kv_cache: what the cache holds of one token (latent attention caches nothing per
    head, so that only whole attentions shrink it).
    flops: of the attentions on one sequence of `sequence_length` tokens, where each reads all of them, or as many as its sliding
    window holds (no causal discount). latency: of the whole model's forward pass, by `table`, which
    `headprune.evaluation.measure_latency_table` makes on the machine that counts.
    Raises InvalidInput for a fraction outside [0, 1), or for none or several quantities.
    """

    heads: float | None = None
    params: float | None = None
    kv_cache: float | None = None
    flops: float | None = None
    latency: float | None = None
    sequence_length: int = 512
    table: LatencyTable | None = None

    def __post_init__(self) -> None:
        given = {name: getattr(self, name) for name in COSTS if getattr(self, name) is not None}
        if len(given) != 1:
            raise InvalidInput(f"a budget names exactly one of {', '.join(COSTS)}; got {', '.join(given) or 'none'}.")
        ((name, fraction),) = given.items()
        if isinstance(fraction, bool) or not isinstance(fraction, Real) or not 0 <= float(fraction) < 1:
            raise InvalidInput(
                f"budget {name}={fraction!r:.80}: expected the fraction to remove, at least 0 and below 1 (0.5 = half)."
            )
        whole_number("sequence_length", self.sequence_length)
        check_arguments(Budget, vars(self))

    @property
    def quantity(self) -> str:
        """Of which a fraction goes: the name of the field."""
        return next(name for name in COSTS if getattr(self, name) is not None)

    @property
    def fraction(self) -> float:
        """How much of it goes."""
        return float(getattr(self, self.quantity))

    def cost(self, shape: SiteShape, head_map: HeadMap, site: str | None = None) -> int:
        """What `head_map` costs at a site of `shape` and this name, in the budget's quantity (latency: nanoseconds)."""
        if self.quantity == "latency":
            return self.measured().cost(shape, head_map, site)
        return COSTS[self.quantity](self, shape, head_map)

    @property
    def fixed_cost(self) -> int:
        """What the model costs apart from its attentions, where the budget counts that too."""
        return self.measured().rest if self.quantity == "latency" else 0

    def measured(self) -> LatencyTable:
        if self.table is None:
            raise InvalidInput(
                "a latency budget needs --table (table=): measure one on this machine with headprune latency "
                "(headprune.evaluation.measure_latency_table)."
            )
        return self.table

    @classmethod
    def of(cls, quantities: Mapping[str, Any]) -> Budget:
        """The budget that a file or a command names: quantity -> fraction, and what goes with it."""
        return cls(**quantities)

    def to_json(self) -> dict[str, float]:
        length = {"sequence_length": self.sequence_length} if self.quantity == "flops" else {}
        return {self.quantity: self.fraction, **length}

    def __str__(self) -> str:
        return f"{self.fraction:.0%} of {self.quantity} away"


def flops(budget: Budget, shape: SiteShape, head_map: HeadMap) -> int:
    """2 per multiply-add: the four projections, QK^T and PV."""
    width, length = shape.head_dim + shape.value_dim, budget.sequence_length
    projected = (head_map.query_heads + shape.own_keys * head_map.kv_heads) * width + head_map.query_heads * shape.gate_width
    keys = min(length, shape.keys_in_window or length)
    return 2 * length * (shape.hidden_size * projected + keys * head_map.query_heads * width)


COSTS: dict[str, Callable[[Budget, SiteShape, HeadMap], int]] = {
    "heads": lambda budget, shape, head_map: head_map.query_heads,
    "params": lambda budget, shape, head_map: shape.parameters(head_map),
    "kv_cache": lambda budget, shape, head_map: shape.cache.of(head_map),
    "flops": flops,
    "latency": lambda budget, shape, head_map: budget.measured().cost(shape, head_map),
}
