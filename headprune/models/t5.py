"""T5 and its relatives: `q`, `k`, `v`, `o`, and a table of relative positions that the first layer reads for all layers.

The first layer's bias [1, heads, query_len, kv_len] is handed from layer to layer. So the table stays whole, every pruned
layer picks the part of its own heads, and hands on what it received.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import Cache, EncoderDecoderCache

from headprune.head_map import HeadMap
from headprune.models.adapters import head_map_of, register_adapter
from headprune.models.emptied import Emptied, count_tokens, empty
from headprune.models.head_counts import set_head_counts
from headprune.models.own_positions import own_part, remember_positions
from headprune.models.selection import select_heads
from headprune.models.site import AttentionSite, Foreign, Kind, Role, contiguous_heads
from headprune.models.specialise import Behaviour, specialise

PARTS: dict[Role, str] = {"query": "q", "key": "k", "value": "v", "output": "o"}


class T5Like:
    name = "t5"

    def site(self, name: str, module: Foreign) -> AttentionSite | None:
        marks = (*PARTS.values(), "key_value_proj_dim", "has_relative_attention_bias", "compute_bias")
        if not all(hasattr(module, mark) for mark in marks) or "position_bias" not in inspect.signature(module.forward).parameters:
            return None
        head_dim, (hidden, features) = module.key_value_proj_dim, module.o.weight.shape
        head_map = head_map_of(module, features, features, head_dim, name)
        projections = tuple(
            contiguous_heads(role, f"{name}.{part}", getattr(module, part), head_map.query_heads, head_dim)
            for role, part in PARTS.items()
        )
        kind: Kind = "cross" if name.endswith("EncDecAttention") else "self"
        return AttentionSite(name, module, module, head_map, head_dim, head_dim, hidden, kind, projections)

    def after_cut(self, site: AttentionSite, head_map: HeadMap, kept: tuple[int, ...]) -> None:
        set_head_counts(site.module, head_map, site.head_dim)
        remember_positions(site.module, site.head_map.query_heads, kept)
        if head_map.query_heads:
            specialise(site.module, SharedPositions)
        else:
            empty(site.module, "o", EmptiedT5)


class SharedPositions(Behaviour):
    """Forward of an attention whose `position_heads` (of `all_position_heads`) are left."""

    position_heads: tuple[int, ...]
    all_position_heads: int
    has_relative_attention_bias: bool
    bias_of_all_heads: Tensor | None

    def compute_bias(self, *args: Any, **kwargs: Any) -> Tensor:
        stock: Any = super()
        self.bias_of_all_heads = bias = stock.compute_bias(*args, **kwargs)
        return select_heads(bias, self.position_heads, 1)

    def forward(
        self,
        hidden_states: Tensor,
        mask: Tensor | None = None,
        key_value_states: Tensor | None = None,
        position_bias: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Any, ...]:
        own = None if position_bias is None else own_part(position_bias, self.position_heads, self.all_position_heads)
        output, used, *rest = super().forward(hidden_states, mask, key_value_states, own, *args, **kwargs)
        if position_bias is None:
            # Without a table all heads have the same: none.
            position_bias = self.bias_of_all_heads if self.has_relative_attention_bias else used[:, :1]
        self.bias_of_all_heads = None
        return output, position_bias, *rest


class EmptiedT5(Emptied):
    """The first layer's positions are still wanted by the others."""

    layer_idx: int
    o: nn.Module
    has_relative_attention_bias: bool
    compute_bias: Callable[..., Tensor]

    def forward(
        self,
        hidden_states: Tensor,
        mask: Tensor | None = None,
        key_value_states: Tensor | None = None,
        position_bias: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Any, ...]:
        seen = 0 if past_key_values is None else past_key_values.get_seq_length(self.layer_idx)
        seen = seen.clone() if isinstance(seen, Tensor) else seen  # a static cache counts on in place
        cross = key_value_states is not None
        source = hidden_states if key_value_states is None else key_value_states
        count_tokens(self, source, cross, {"past_key_values": past_key_values})
        output = self.o(hidden_states.new_zeros(*hidden_states.shape[:-1], 0))
        if position_bias is None:
            length = key_length(self, source, cross, past_key_values)
            position_bias = hidden_states.new_zeros(1, 1, hidden_states.shape[1], length)
            if self.has_relative_attention_bias:
                position_bias = self.compute_bias(hidden_states.shape[1], length, hidden_states.device, seen)
        return output, position_bias, None


def key_length(module: Foreign, states: Tensor, cross: bool, cache: Cache | None) -> int:
    """Keys that a layer with heads would have at this point."""
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.cross_attention_cache if cross else cache.self_attention_cache
    if cache is None:
        return states.shape[1]
    layer: Foreign = cache.layers[module.layer_idx]
    length: int = layer.keys.shape[-2]
    return length


register_adapter(T5Like())
