"""BLIP's vision attentions take the model's width by the number of heads for the size of a head, which no longer holds when some
are gone."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from headprune.models.behaviour import Behaviour


class OwnHeadDim(Behaviour):
    """The same forward with the size of a head that the module itself knows. BLIP computes its attention by itself, BLIP-2 and
    InstructBLIP through transformers' attention interface."""

    config: Any
    num_heads: int
    head_dim: int
    scale: float
    attention_dropout: float
    qkv: nn.Module
    projection: nn.Module
    dropout: nn.Module

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        query, key, value = self.qkv(hidden_states).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        if hasattr(self, "attention_dropout"):
            functions: Any = ALL_ATTENTION_FUNCTIONS
            eager = getattr(sys.modules[type(self).__module__], "eager_attention_forward", None)
            function = functions.get_interface(self.config._attn_implementation, eager)
            dropout = self.attention_dropout if self.training else 0.0
            output, weights = function(
                self, query, key, value, attention_mask=None, dropout=dropout, scaling=self.scale, **kwargs
            )  # fmt: skip
        else:
            weights = self.dropout(torch.softmax(query @ key.transpose(-1, -2) * self.scale, dim=-1))
            output = (weights @ value).transpose(1, 2)
        return self.projection(output.flatten(2)), weights
