"""The forward of an attention in the decoders of LED and TrOCR (in FSMT: headprune.models.fsmt_forward) that has lost heads:
the stock one with the width of the heads that are there."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import EncoderDecoderCache

from headprune.models.behaviour import Behaviour
from headprune.models.emptied import Emptied


class KeepsKeys(Behaviour):
    """An attention of a decoder, to its own tokens or to an encoder's, with the heads that its projections have."""

    head_dim: int
    layer_idx: int

    def made(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values, [batch, heads, tokens, head_dim]."""
        raise NotImplementedError

    def keys_and_values(self, states: Tensor, source: Tensor | None, cache: Any) -> tuple[Tensor, Tensor]:
        """Those of all tokens so far; of the encoder's tokens they are made once."""
        cross, both = source is not None, isinstance(cache, EncoderDecoderCache)
        own = (cache.cross_attention_cache if cross else cache.self_attention_cache) if both else cache
        if cross and both and cache.is_updated.get(self.layer_idx):
            return own.layers[self.layer_idx].keys, own.layers[self.layer_idx].values
        made = self.made(states if source is None else source)
        if own is not None:
            made = own.update(*made, self.layer_idx)
        if cross and both:
            cache.is_updated[self.layer_idx] = True
        return made

    def split(self, states: Tensor) -> Tensor:
        """[batch, tokens, features] -> [batch, heads, tokens, head_dim]"""
        apart: Tensor = states.unflatten(-1, (-1, self.head_dim))
        return apart.transpose(1, 2)


class OwnHeads(KeepsKeys):
    """BART's attention with as many heads as its projections have."""

    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    out_proj: nn.Module
    scaling: float
    dropout: float

    def attend(self, states: Tensor, source: Tensor | None, cache: Any, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """What the layer gives and its weights. states, source: [batch, tokens, features]; mask: added to the scores."""
        query = self.split(self.q_proj(states) * self.scaling)
        key, value = self.keys_and_values(states, source, cache)
        scores = query @ key.transpose(-2, -1)
        weights = (scores if mask is None else scores + mask).softmax(dim=-1)
        output = (F.dropout(weights, self.dropout, self.training) @ value).transpose(1, 2).flatten(2)
        return self.out_proj(output), weights

    def made(self, states: Tensor) -> tuple[Tensor, Tensor]:
        return self.split(self.k_proj(states)), self.split(self.v_proj(states))


class OwnLedDecoder(OwnHeads):
    def forward(
        self,
        hidden_states: Tensor,
        key_value_states: Tensor | None = None,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        output_attentions: bool = False,
    ) -> tuple[Any, ...]:
        output, weights = self.attend(hidden_states, key_value_states, past_key_values, attention_mask)
        return output, weights if output_attentions else None, past_key_values


class OwnTrOCR(OwnLedDecoder):
    """TrOCR's does not hand back the cache."""

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        return super().forward(*args, **kwargs)[:2]


class EmptiedLedDecoder(Emptied):
    """It hands back the cache too."""

    def result(self, output: Tensor, weights: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        return output, weights if kwargs.get("output_attentions") else None, kwargs.get("past_key_values")
