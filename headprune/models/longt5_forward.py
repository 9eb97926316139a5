"""LongT5's encoder: each block of tokens attends to itself and its neighbours, and (transient global) to sums of blocks. Its first
layer makes biases of positions [batch or 1, blocks, heads, queries, keys], with padding in them, that go from layer to layer; a
pruned one picks the part of its own heads, and hands on what it received."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from headprune.models.behaviour import Behaviour
from headprune.models.emptied import Emptied
from headprune.models.selection import select_heads


class BlockPositions(Behaviour):
    """Forward of an attention whose `position_heads` (of `all_position_heads`) are left."""

    position_heads: tuple[int, ...]
    all_position_heads: int
    block_len: int
    has_relative_attention_bias: bool
    compute_bias: Callable[[int], Tensor]
    compute_side_bias: Callable[[Tensor, Tensor], Tensor]

    def forward(
        self,
        hidden_states: Tensor,
        mask: Tensor | None = None,
        position_bias: Tensor | None = None,
        output_attentions: bool = False,
    ) -> tuple[Any, ...]:
        if position_bias is None:
            position_bias = self.positions(hidden_states, mask)
        own = select_heads(position_bias, self.position_heads, 2)
        output, _, *weights = super().forward(hidden_states, mask, own, output_attentions)
        return output, position_bias, *weights

    def positions(self, states: Tensor, mask: Tensor | None) -> Tensor:
        """What the stock forward makes for all heads. mask: of all blocks; for transient global attention of all tokens."""
        family, glances = sys.modules[type(self).__module__], hasattr(self, "global_block_size")
        tokens = states.new_ones(states.shape[:2]) if mask is None else mask
        seen = family._get_local_attention_mask(tokens, self.block_len, states.device) if glances else mask
        shape = (1, 1, self.all_position_heads, self.block_len, 3 * self.block_len)
        bias = self.compute_bias(self.block_len) if self.has_relative_attention_bias else states.new_zeros(shape)
        if seen is not None:
            bias = bias + torch.where(seen > 0, 0.0, -1e10).transpose(1, 2)
        if glances:
            _, segments = family._make_global_fixed_block_ids(tokens, self.global_block_size)
            side = family._split_into_blocks(self.compute_side_bias(tokens, segments), self.block_len, dim=-2)
            bias = torch.cat([bias, side.transpose(1, 2)], dim=-1).to(states)
        return bias


class EmptiedBlocks(BlockPositions, Emptied):
    """The first layer's positions are still wanted by the others."""

    o: nn.Module

    def forward(
        self,
        hidden_states: Tensor,
        mask: Tensor | None = None,
        position_bias: Tensor | None = None,
        output_attentions: bool = False,
    ) -> tuple[Any, ...]:
        if position_bias is None:
            position_bias = self.positions(hidden_states, mask)
        output = self.o(hidden_states.new_zeros(*hidden_states.shape[:-1], 0))
        weights = position_bias.narrow(2, 0, 0)
        return (output, position_bias, weights) if output_attentions else (output, position_bias)
