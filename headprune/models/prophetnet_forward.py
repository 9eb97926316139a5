"""The forwards of ProphetNet's attentions with the heads that are there. Stock ones give as many features as they are given, and
their masks are made for the original's heads, for which they are all alike."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headprune.models.emptied import Emptied, count_tokens
from headprune.models.led_forward import KeepsKeys
from headprune.models.selection import select_heads


class OwnProphetNet(KeepsKeys):
    """Of the encoder, and of the decoder to the encoder."""

    query_proj: nn.Module
    key_proj: nn.Module
    value_proj: nn.Module
    out_proj: nn.Module
    attention_dropout: float
    dropout: float

    def forward(
        self,
        hidden_states: Tensor,
        key_value_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        output_attentions: bool | None = False,
        **_: Any,
    ) -> tuple[Tensor, Tensor | None]:
        query = self.split(self.query_proj(hidden_states) / self.head_dim**0.5)
        key, value = self.keys_and_values(hidden_states, key_value_states, past_key_values)
        scores = query @ key.transpose(-2, -1)
        if attention_mask is not None and attention_mask.dim():
            scores = scores + attention_mask[:, : scores.shape[1]]
        weights = F.dropout(scores.softmax(dim=-1), self.attention_dropout, self.training)
        output = self.out_proj((weights @ value).transpose(1, 2).flatten(2))
        return F.dropout(output, self.dropout, self.training), scores if output_attentions else None

    def made(self, states: Tensor) -> tuple[Tensor, Tensor]:
        return self.split(self.key_proj(states)), self.split(self.value_proj(states))


class OwnNgram(KeepsKeys):
    """Of the decoder to itself: a main stream and, behind it, `ngram` streams that predict. What all give is projected at once.

    The stock module scatters the predicting streams' relative positions over tokens and heads, so that a head reads those of
    others: they are made for all the heads that the original had, and each head here takes its own.
    """

    query_proj: nn.Module
    key_proj: nn.Module
    value_proj: nn.Module
    out_proj: nn.Module
    attention_dropout: float
    dropout: float
    ngram: int
    num_attn_heads: int

    def forward(
        self,
        hidden_states: Tensor,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        extended_predict_attention_mask: Tensor | None = None,
        main_relative_position_buckets: Tensor | None = None,
        predict_relative_position_buckets: Tensor | None = None,
        position_ids: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        tokens = hidden_states.shape[1] // (1 + self.ngram)
        main, predicting = hidden_states[:, :tokens], hidden_states[:, tokens:]
        query = self.split(self.query_proj(hidden_states) / self.head_dim**0.5)
        key, value = self.keys_and_values(main, None, past_key_values)
        new_key, new_value = self.made(predicting)

        scores = query[:, :, :tokens] @ key.transpose(-2, -1)
        scores = scores + self.of_own_heads("main", main, scores, position_ids, main_relative_position_buckets)
        if attention_mask is not None:
            scores = scores + attention_mask[:, : scores.shape[1]]
        weights = self.weights(scores)

        ahead = self.streams(query[:, :, tokens:]) @ self.behind(key, new_key).transpose(-2, -1)
        states = predicting.unflatten(1, (self.ngram, tokens)).transpose(1, 2)
        ahead = ahead + self.of_own_heads("predict", states, ahead, position_ids, predict_relative_position_buckets)
        if extended_predict_attention_mask is not None:
            ahead = ahead + extended_predict_attention_mask[:, : scores.shape[1]].transpose(1, 2).to(ahead.dtype)
        ahead_weights = self.weights(ahead)

        found = torch.cat([(weights @ value)[:, None], ahead_weights @ self.behind(value, new_value)], dim=1)
        output = self.out_proj(found.transpose(2, 3).flatten(3).flatten(1, 2))
        return F.dropout(output, self.dropout, self.training), weights, ahead_weights

    def made(self, states: Tensor) -> tuple[Tensor, Tensor]:
        return self.split(self.key_proj(states)), self.split(self.value_proj(states))

    def weights(self, scores: Tensor) -> Tensor:
        return F.dropout(scores.softmax(dim=-1, dtype=torch.float32).type_as(scores), self.attention_dropout, self.training)

    def streams(self, heads: Tensor) -> Tensor:
        """[batch, heads, streams * tokens, head_dim] -> [batch, streams, heads, tokens, head_dim]"""
        apart: Tensor = heads.unflatten(2, (self.ngram, -1))
        return apart.transpose(1, 2)

    def behind(self, main: Tensor, predicting: Tensor) -> Tensor:
        """What each predicting stream reads: the main stream and itself."""
        return torch.cat([main[:, None].expand(-1, self.ngram, -1, -1, -1), self.streams(predicting)], dim=3)

    def of_own_heads(self, stream: str, states: Tensor, scores: Tensor, positions: Any, buckets: Any) -> Tensor:
        """Relative positions for `scores` [batch, (streams,) heads, queries, keys]."""
        stock: Any = self
        every = self.num_attn_heads
        shape = scores.new_empty(()).expand(*scores.shape[:-3], every, *scores.shape[-2:])  # no more is read of it
        found: Tensor = getattr(stock, f"get_{stream}_relative_pos_embeddings")(states, shape, positions, buckets)
        return select_heads(found, getattr(self, "position_heads", tuple(range(every))), -3)


class EmptiedProphetNet(Emptied):
    """Returns attention weights only where they are asked for."""

    def result(self, output: Tensor, weights: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return output, weights if kwargs.get("output_attentions") else None


class EmptiedNgram(Emptied):
    """Its cache counts the tokens of the main stream."""

    ngram: int

    def keys(self, states: Tensor, cross: bool, kwargs: dict[str, Any]) -> int:
        return count_tokens(self, states[:, : states.shape[1] // (1 + self.ngram)], cross, kwargs)

    def result(self, output: Tensor, weights: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        batch, _, queries, keys = weights.shape
        tokens = queries // (1 + self.ngram)
        return output, weights[:, :, :tokens], weights.new_empty(batch, self.ngram, 0, tokens, keys + tokens)
