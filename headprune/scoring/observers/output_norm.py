"""Observes how much each head adds to its layer's output."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from headprune.models.gating import output_input_hooks
from headprune.models.packed import is_packed, sample_lengths
from headprune.models.site import AttentionSite
from headprune.models.tokens import valid_tokens
from headprune.scoring.observations import Need
from headprune.scoring.observer import Observer, Setting, observes, refuse_joint
from headprune.scoring.observers.sample_rows import SampleRows


@observes(Need.OUTPUT_NORM)
class OutputNorms(Observer):
    """||O_hi W_h^T|| through the Gram W_h^T W_h [value_dim, value_dim] of the head's output weights: ||O W^T||^2 = O (W^T W) O^T,
    so nothing of the model's width is formed."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        refuse_joint(setting.sites)
        self._grams = {site.name: head_grams(site) for site in setting.sites}
        self._rows = SampleRows(setting, ("projected_norm",))
        self._seen: set[str] = set()

    def watching_forward(self, batch: Any) -> AbstractContextManager[object]:
        return output_input_hooks(self.setting.sites, lambda site: self._adder(site, batch))

    def found(self) -> dict[str, dict[str, Tensor]]:
        return self._rows.found()

    def reached(self) -> set[str]:
        return set(self._seen)

    def _adder(self, site: AttentionSite, batch: Any) -> Callable[[Tensor], None]:
        gram, features, mask = self._grams[site.name], site.output.features, self.setting.token_mask(site.name, batch)

        @torch.no_grad()
        def add(inputs: Tensor) -> None:
            self._seen.add(site.name)
            valid = valid_tokens(inputs, mask)
            heads = inputs[..., features.to(inputs.device)].float()  # [batch, tokens, heads, value_dim], packed [tokens, ...]
            squares = (torch.einsum("...hd,hde->...he", heads, gram) * heads).sum(dim=-1).clamp(min=0)
            norms = squares.sqrt().masked_fill(~valid[..., None], 0.0)
            if is_packed(inputs):
                lengths = sample_lengths(self.setting.model, site.name, batch, len(inputs))
                means = torch.stack([own.mean(dim=0) for own in norms.split(lengths) if len(own)])
            else:
                means = norms.flatten(1, -2).sum(dim=1) / valid.flatten(1).sum(dim=1, keepdim=True).clamp(min=1)
            self._rows.add(site.name, projected_norm=means)

        return add


def head_grams(site: AttentionSite) -> Tensor:
    """fp32 [heads, value_dim, value_dim], on the device of the weights."""
    weights = site.output.head_weights().float()  # [heads, value_dim, hidden]
    return weights @ weights.transpose(1, 2)
