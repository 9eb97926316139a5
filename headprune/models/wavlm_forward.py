"""The forward of a WavLM attention whose heads can be reached and cut. The stock one hands its weights to torch's
multi_head_attention_forward, past its own projections.

The first layer's position bias [batch * heads, tokens, tokens] is handed from layer to layer: it stays that of all the original
heads, and each layer picks those that it has. So do the gates on it: each head makes its gate of its own part of the states.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from headprune.models.behaviour import Behaviour
from headprune.models.emptied import Emptied, no_weights, tokens_in
from headprune.models.selection import select_heads


class OwnWavLM(Behaviour):
    """`position_heads` (of `all_position_heads`) are there once heads are gone. Our kernels compute the attention where headprune
    is installed."""

    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    out_proj: nn.Module
    gru_rel_pos_linear: nn.Module
    gru_rel_pos_const: Tensor
    num_heads: int
    head_dim: int
    scaling: float
    dropout: float

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_bias: Tensor | None = None,
        index: int = 0,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        if position_bias is None:
            position_bias = bias_of_all_heads(self, hidden_states)
        query, key, value = (self.split(layer(hidden_states)) for layer in (self.q_proj, self.k_proj, self.v_proj))
        bias = self.gated_bias(hidden_states, position_bias).to(query.dtype)
        mask = None if attention_mask is None else attention_mask.eq(1)
        function: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get("headprune", torch_attention)
        dropout = self.dropout if self.training else 0.0
        output, _ = function(
            self, query, key, value, mask, dropout=dropout, scaling=self.scaling, is_causal=False, position_bias=bias
        )  # fmt: skip
        # Where the model's config asks for them, only the hook that takes them tells.
        asked = kwargs.get("output_attentions", bool(self._forward_hooks))
        weights = self.weights(query, key, bias, mask) if asked else None
        return self.out_proj(output.flatten(2)), weights, position_bias

    def gated_bias(self, hidden_states: Tensor, position_bias: Tensor) -> Tensor:
        """[batch, heads, tokens, tokens]"""
        every = getattr(self, "all_position_heads", self.num_heads)
        heads = getattr(self, "position_heads", tuple(range(every)))
        states = select_heads(hidden_states.unflatten(-1, (every, self.head_dim)), heads, 2).transpose(1, 2)
        reset, update = self.gru_rel_pos_linear(states).unflatten(-1, (2, 4)).sum(-1).sigmoid().chunk(2, dim=-1)
        gate: Tensor = reset * (update * self.gru_rel_pos_const - 1.0) + 2.0
        return gate * select_heads(position_bias.unflatten(0, (-1, every)), heads, 1)

    def weights(self, query: Tensor, key: Tensor, bias: Tensor, mask: Tensor | None) -> Tensor:
        """As the stock module gives them: for each head the mean over all heads."""
        scores = query @ key.transpose(-2, -1) * self.scaling + bias
        scores = scores if mask is None else scores.masked_fill(~mask[:, None, None], float("-inf"))
        mean = scores.softmax(dim=-1).mean(dim=1, keepdim=True)
        return mean.expand_as(scores)

    def split(self, states: Tensor) -> Tensor:
        """[batch, tokens, features] -> [batch, heads, tokens, head_dim]"""
        return states.view(*states.shape[:-1], self.num_heads, self.head_dim).transpose(1, 2)


class EmptiedWavLM(Emptied):
    """The first layer's positions are still wanted by the others."""

    out_proj: nn.Module

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, position_bias: Tensor | None = None, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        if position_bias is None:
            position_bias = bias_of_all_heads(self, hidden_states)
        output = self.out_proj(hidden_states.new_zeros(*hidden_states.shape[:-1], 0))
        return output, no_weights(hidden_states, tokens_in(hidden_states)), position_bias


def bias_of_all_heads(attention: Any, states: Tensor) -> Tensor:
    """As the first layer makes it, [batch * heads, tokens, tokens]."""
    bias: Tensor = attention.compute_bias(states.shape[1], states.shape[1])
    return bias.expand(states.shape[0], *bias.shape).flatten(0, 1)


def torch_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    dropout: float,
    scaling: float,
    is_causal: bool,
    position_bias: Tensor,
) -> tuple[Tensor, None]:
    """Where headprune is not."""
    bias = position_bias if mask is None else torch.where(mask[:, None, None], position_bias, float("-inf"))
    output = F.scaled_dot_product_attention(query, key, value, bias, dropout, is_causal, scale=scaling)
    return output.transpose(1, 2), None
