"""Observes what least squares needs of each output projection: the Gram matrices of its inputs and of its weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from headprune.models.gating import output_input_hook
from headprune.models.site import AttentionSite, is_conv1d
from headprune.models.tokens import valid_tokens
from headprune.scoring.observations import Need
from headprune.scoring.observer import Observer, Setting, observes


@observes(Need.GRAM)
class Grams(Observer):
    """Sums over the valid tokens of every batch."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        # Columns in the order of heads, whatever the layout; fp64, so that the order of batches leaves no trace.
        self._columns = {site.name: site.output.features.flatten() for site in setting.sites}
        self._sums = {
            name: {
                "input_gram": torch.zeros(len(columns), len(columns), dtype=torch.float64),
                "input_sum": torch.zeros(len(columns), dtype=torch.float64),
                "tokens": torch.zeros((), dtype=torch.float64),
            }
            for name, columns in self._columns.items()
        }

    @contextmanager
    def watching_batch(self, batch: Any) -> Iterator[None]:
        with ExitStack() as stack:
            for site in self.setting.sites:
                stack.enter_context(output_input_hook(site, self._adder(site, self.setting.token_mask(site.name, batch))))
            yield

    def found(self) -> dict[str, dict[str, Tensor]]:
        return {
            site.name: {**{name: total.clone() for name, total in self._sums[site.name].items()}, **self._output_weights(site)}
            for site in self.setting.sites
        }

    def reached(self) -> set[str]:
        return {name for name, sums in self._sums.items() if sums["tokens"]}

    def _output_weights(self, site: AttentionSite) -> dict[str, Tensor]:
        weight = site.output.module.weight.detach()
        weight = (weight.T if is_conv1d(site.output.module) else weight)[:, self._columns[site.name].to(weight.device)].double()
        return {"output_gram": (weight.T @ weight).cpu(), "output_l1": weight.abs().sum(dim=0).cpu()}

    def _adder(self, site: AttentionSite, mask: Tensor | None):
        sums, columns = self._sums[site.name], self._columns[site.name]

        def add(inputs: Tensor) -> None:
            inputs = inputs.detach()
            tokens = inputs[valid_tokens(inputs, mask)][:, columns.to(inputs.device)].float()
            sums["input_gram"] += (tokens.T @ tokens).cpu()
            sums["input_sum"] += tokens.sum(dim=0).cpu()
            sums["tokens"] += len(tokens)

        return add
