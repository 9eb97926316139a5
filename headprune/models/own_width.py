"""Attentions whose forward takes the width of a head from that of the states (TimeSformer, MGP-STR): once heads are gone they
compute the same with the heads that are there."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from headprune.models.behaviour import Behaviour


class OwnWidth(Behaviour):
    """`qkv` holds queries, keys and values, each as wide as all heads."""

    qkv: nn.Module
    num_heads: int
    scale: float
    attn_drop: nn.Module

    def heads(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """What the heads give, [batch, tokens, features], and their weights [batch, heads, tokens, tokens]."""
        fused: Tensor = self.qkv(hidden_states)
        query, key, value = fused.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        weights: Tensor = self.attn_drop((query @ key.transpose(-2, -1) * self.scale).softmax(dim=-1))
        return (weights @ value).transpose(1, 2).flatten(2), weights

    def forward(self, hidden_states: Tensor, output_attentions: bool = False) -> tuple[Tensor, ...]:
        output, weights = self.heads(hidden_states)
        return (output, weights) if output_attentions else (output,)


class OwnWidthProjected(OwnWidth):
    """The output projection is part of it, and it always returns its weights."""

    proj: nn.Module
    proj_drop: nn.Module

    def forward(self, hidden_states: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        output, weights = self.heads(hidden_states)
        return self.proj_drop(self.proj(output)), weights
