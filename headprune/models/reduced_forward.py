"""PVT v2's attention, whose keys come from a smaller picture, gives as many features as it is given; once heads are gone it
computes the same with the heads that are there."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor, nn

from headprune.models.behaviour import Behaviour


class OwnReduced(Behaviour):
    query: nn.Module
    key: nn.Module
    value: nn.Module
    proj: nn.Module
    attn_drop: nn.Module
    proj_drop: nn.Module
    pool: nn.Module
    spatial_reduction: nn.Module
    layer_norm: nn.Module
    act: nn.Module
    linear_attention: bool
    spatial_reduction_ratio: int
    attention_head_size: int
    transpose_for_scores: Callable[[Tensor], Tensor]

    def forward(self, hidden_states: Tensor, height: int, width: int, output_attentions: bool = False) -> tuple[Tensor, ...]:
        read = self.smaller(hidden_states, height, width)
        query = self.transpose_for_scores(self.query(hidden_states))
        key, value = self.transpose_for_scores(self.key(read)), self.transpose_for_scores(self.value(read))
        weights = self.attn_drop((query @ key.transpose(-1, -2) / math.sqrt(self.attention_head_size)).softmax(dim=-1))
        output = self.proj_drop(self.proj((weights @ value).transpose(1, 2).flatten(2)))
        return (output, weights) if output_attentions else (output,)

    def smaller(self, states: Tensor, height: int, width: int) -> Tensor:
        """What the keys and values are made of, [batch, fewer tokens, features]."""
        if not self.linear_attention and self.spatial_reduction_ratio <= 1:
            return states
        picture = states.transpose(1, 2).unflatten(2, (height, width))
        picture = self.pool(picture) if self.linear_attention else picture
        normed: Tensor = self.layer_norm(self.spatial_reduction(picture).flatten(2).transpose(1, 2))
        return self.act(normed) if self.linear_attention else normed
