"""ConvBERT's attention with the heads that are there. Beside each head that attends stands one that convolves, by a kernel that the
queries of all heads make: those stay."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headprune.models.behaviour import Behaviour
from headprune.models.selection import select_heads


class OwnConvBert(Behaviour):
    """`position_heads` of the original are left."""

    query: nn.Module
    key: nn.Module
    value: nn.Module
    key_conv_attn_layer: nn.Module
    conv_kernel_layer: nn.Module
    conv_out_layer: nn.Module
    dropout: nn.Module
    conv_kernel_size: int
    attention_head_size: int
    position_heads: tuple[int, ...]

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, encoder_hidden_states: Tensor | None = None, **_: Any
    ) -> tuple[Tensor, Tensor]:
        read = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        queries = self.query(hidden_states)
        query = self.split(select_heads(queries, self.position_heads, -1, self.attention_head_size))
        key, value = self.split(self.key(read)), self.split(self.value(read))
        scores = query @ key.transpose(-1, -2) / math.sqrt(self.attention_head_size)
        weights = self.dropout((scores if attention_mask is None else scores + attention_mask).softmax(dim=-1))
        found = torch.cat([(weights @ value).transpose(1, 2), self.convolved(hidden_states, queries)], dim=2)
        return found.flatten(2), weights

    def convolved(self, states: Tensor, queries: Tensor) -> Tensor:
        """[batch, tokens, heads, head_dim]"""
        size = self.conv_kernel_size
        spans = self.key_conv_attn_layer(states.transpose(1, 2)).transpose(1, 2) * queries
        kernels = self.conv_kernel_layer(spans).unflatten(-1, (-1, size)).softmax(dim=-1)
        columns = self.conv_out_layer(states).transpose(1, 2).unsqueeze(-1)
        around = F.unfold(columns, (size, 1), padding=((size - 1) // 2, 0)).transpose(1, 2)
        inside: Tensor = around.unflatten(-1, (-1, self.attention_head_size, size)) @ kernels.unsqueeze(-1)
        return inside.squeeze(-1)

    def split(self, states: Tensor) -> Tensor:
        """[batch, tokens, features] -> [batch, heads, tokens, head_dim]"""
        apart: Tensor = states.unflatten(-1, (-1, self.attention_head_size))
        return apart.transpose(1, 2)
