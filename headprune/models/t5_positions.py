"""Relative positions in T5 and its relatives: the first layer's bias [1, heads, query_len, kv_len] is handed from layer to layer.
So the table stays whole, every pruned layer picks the part of its own heads, and hands on what it received."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import Cache

from headprune.models.behaviour import Behaviour
from headprune.models.emptied import Emptied, count_tokens, no_weights
from headprune.models.own_positions import own_part
from headprune.models.selection import select_heads


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
        length = count_tokens(self, source, cross, {"past_key_values": past_key_values})
        output = self.o(hidden_states.new_zeros(*hidden_states.shape[:-1], 0))
        if position_bias is None:
            position_bias = hidden_states.new_zeros(1, 1, hidden_states.shape[1], length)
            if self.has_relative_attention_bias:
                position_bias = self.compute_bias(hidden_states.shape[1], length, hidden_states.device, seen)
        return output, position_bias, no_weights(hidden_states, length)
