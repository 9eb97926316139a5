"""The forward of a Longformer's attention that has lost heads: the stock one with the width of the heads that are there."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from headprune.models.behaviour import Behaviour
from headprune.models.emptied import Emptied


class OwnLongformer(Behaviour):
    """Everything between the projections is the stock module's; positions: where tokens with global attention stand."""

    num_heads: int
    head_dim: int
    one_sided_attn_window_size: int
    dropout: float

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor,
        is_index_masked: Tensor,
        is_index_global_attn: Tensor | None = None,
        is_global_attn: bool | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, ...]:
        stock: Any = self
        window = self.one_sided_attn_window_size
        query = self.in_heads(stock.query(hidden_states) / math.sqrt(self.head_dim))
        key, value = self.in_heads(stock.key(hidden_states)), self.in_heads(stock.value(hidden_states))
        scores = stock._sliding_chunks_query_key_matmul(query, key, window)
        special = (attention_mask != 0)[:, :, None, None]  # padded, or with global attention
        bias = special.type_as(query).masked_fill(special, torch.finfo(query.dtype).min)
        scores = scores + stock._sliding_chunks_query_key_matmul(torch.ones_like(bias), bias, window)
        positions: dict[str, Any] = {}
        if is_global_attn:
            most, everywhere, there, not_there = stock._get_global_attn_indices(is_index_global_attn)
            positions = {
                "max_num_global_attn_indices": most,
                "is_index_global_attn_nonzero": everywhere,
                "is_local_index_global_attn_nonzero": there,
            }
            of_global = stock._concat_with_global_key_attn_probs(
                query_vectors=query, key_vectors=key, is_local_index_no_global_attn_nonzero=not_there, **positions
            )
            scores = torch.cat((of_global, scores), dim=-1)
        weights = scores.softmax(dim=-1, dtype=torch.float32).masked_fill(is_index_masked[:, :, None, None], 0.0).type_as(scores)
        weights = F.dropout(weights, self.dropout, self.training)
        if not is_global_attn:
            output = stock._sliding_chunks_matmul_attn_probs_value(weights, value, window).flatten(2)
            return (output, weights) if output_attentions else (output,)
        output = stock._compute_attn_output_with_global_indices(value_vectors=value, attn_probs=weights, **positions).flatten(2)
        found, global_weights = stock._compute_global_attn_output_from_hidden(
            hidden_states=hidden_states.transpose(0, 1), is_local_index_no_global_attn_nonzero=not_there,
            is_index_masked=is_index_masked, **positions,
        )  # fmt: skip
        output = output.index_put(everywhere, found[there[0], :, there[1]].flatten(1))
        weights = weights.index_put(everywhere, weights.new_zeros(()))  # those of these tokens are `global_weights`
        return (output, weights, global_weights) if output_attentions else (output,)

    def in_heads(self, states: Tensor) -> Tensor:
        """[batch, tokens, heads, head_dim]"""
        return states.view(*states.shape[:-1], self.num_heads, self.head_dim)


class EmptiedLongformer(Emptied):
    """Its weights are [batch, queries, heads, window], those of tokens with global attention [batch, heads, queries, keys]."""

    def result(self, output: Tensor, weights: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, ...]:
        if not kwargs.get("output_attentions"):
            return (output,)
        return (output, weights.transpose(1, 2), *([weights] if kwargs.get("is_global_attn") else []))
