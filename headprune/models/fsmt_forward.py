"""FSMT's attention takes the width of all heads from the states, and has tokens before samples, in what its output projection
receives too; here that is [batch, tokens, features], as everywhere."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from headprune.models.emptied import Emptied, count_tokens, no_weights
from headprune.models.led_forward import OwnHeads


class OwnFsmt(OwnHeads):
    encoder_decoder_attention: bool

    def forward(
        self,
        query: Tensor,
        key: Tensor | None,
        key_padding_mask: Tensor | None = None,
        layer_state: Any = None,
        attn_mask: Tensor | None = None,
        output_attentions: bool | None = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """query, key [tokens, batch, features]; key_padding_mask bool [batch, keys], True where there is padding."""
        states, mask = query.transpose(0, 1), attn_mask
        if key_padding_mask is not None and key_padding_mask.dim():
            padding, hidden = key_padding_mask[:, None, None], torch.finfo(states.dtype).min
            mask = torch.where(padding, hidden, states.new_zeros(()) if mask is None else mask)
        output, weights = self.attend(states, self.source(key), layer_state, mask)
        return output.transpose(0, 1), weights if output_attentions else None

    def source(self, key: Tensor | None) -> Tensor | None:
        """The encoder's tokens, [batch, tokens, features]; None in attention to a decoder's or encoder's own."""
        return key.transpose(0, 1) if self.encoder_decoder_attention and key is not None else None


class EmptiedFsmt(OwnFsmt, Emptied):
    def forward(
        self,
        query: Tensor,
        key: Tensor | None,
        key_padding_mask: Tensor | None = None,
        layer_state: Any = None,
        attn_mask: Tensor | None = None,
        output_attentions: bool | None = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        states, source = query.transpose(0, 1), self.source(key)
        read = states if source is None else source
        keys = count_tokens(self, read, source is not None, {"past_key_values": layer_state})
        output: Tensor = self.out_proj(states.new_zeros(*states.shape[:-1], 0))
        return output.transpose(0, 1), no_weights(states, keys) if output_attentions else None
