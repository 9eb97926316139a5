"""Observes what least squares needs of each output projection: the Gram matrices of its inputs and of its weights.

Each batch's Gram is a matrix product in fp32 where the model runs, summed in fp64 there or on `gram_device`, so that neither a
large sum nor the order of batches costs digits. The product is about the batch's mean, which is added in fp64: what a covariance
takes away again, often far more than what is left, it has never been rounded with.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from headprune.models.gating import output_input_hooks
from headprune.models.quantised import plain_weight
from headprune.models.site import AttentionSite, is_conv1d
from headprune.models.tokens import valid_tokens
from headprune.scoring.observations import Need
from headprune.scoring.observer import Observer, Setting, observes, refuse_joint


@observes(Need.GRAM)
class Grams(Observer):
    """Sums over the valid tokens of every batch."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        refuse_joint(setting.sites)
        # Columns in the order of heads, whatever the layout.
        self._columns = {site.name: site.output.features.flatten() for site in setting.sites}
        places = [summing_device(site, setting.gram_device) for site in setting.sites]
        self._sums = {
            name: {
                "input_gram": torch.zeros(len(columns), len(columns), dtype=torch.float64, device=place),
                "input_sum": torch.zeros(len(columns), dtype=torch.float64, device=place),
                "tokens": torch.zeros((), dtype=torch.float64, device="cpu"),
            }
            for (name, columns), place in zip(self._columns.items(), places)
        }

    def watching_forward(self, batch: Any) -> AbstractContextManager[object]:
        return output_input_hooks(self.setting.sites, lambda site: self._adder(site, self.setting.token_mask(site.name, batch)))

    def found(self) -> dict[str, dict[str, Tensor]]:
        return {
            site.name: {
                **{name: total.cpu().clone() for name, total in self._sums[site.name].items()}, **self._output_weights(site)
            }
            for site in self.setting.sites
        }  # fmt: skip

    def reached(self) -> set[str]:
        return {name for name, sums in self._sums.items() if sums["tokens"]}

    def _output_weights(self, site: AttentionSite) -> dict[str, Tensor]:
        weight = plain_weight(site.output.module)
        weight = (weight.T if is_conv1d(site.output.module) else weight)[:, self._columns[site.name].to(weight.device)].double()
        return {"output_gram": (weight.T @ weight).cpu(), "output_l1": weight.abs().sum(dim=0).cpu()}

    def _adder(self, site: AttentionSite, mask: Tensor | None) -> Callable[[Tensor], None]:
        sums, columns = self._sums[site.name], self._columns[site.name]

        def add(inputs: Tensor) -> None:
            inputs = inputs.detach()
            tokens = inputs[valid_tokens(inputs, mask)][:, columns.to(inputs.device)].float()
            if not len(tokens):
                return
            mean = tokens.mean(dim=0)
            about = tokens - mean
            gram, mean, rest = (part.to(sums["input_gram"].device).double() for part in (about.T @ about, mean, about.sum(dim=0)))
            total = rest + len(tokens) * mean
            sums["input_gram"] += gram.addr_(mean, total).addr_(rest, mean)
            sums["input_sum"] += total
            sums["tokens"] += len(tokens)

        return add


def summing_device(site: AttentionSite, asked: torch.device | str | None) -> torch.device:
    """Where the sums of `site` lie: as asked, else beside its weights; on the CPU where that device knows no fp64."""
    device = torch.device(asked) if asked is not None else site.output.module.weight.device
    return torch.device("cpu") if device.type in ("mps", "meta") else device
