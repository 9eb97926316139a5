"""Observes products of weight and gradient, summed over each head's weights, once a batch.

Only the attentions' projections get gradients, everything else stays frozen; they live for one batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from headprune.ops import head_weight_stats
from headprune.scoring.head_weights import ROLES, head_slices, rows_of, weights_of
from headprune.scoring.observations import Need
from headprune.scoring.observer import Observer, Setting, observes
from headprune.scoring.observers.gate_gradient import rows_of as rows_in

FIELDS = {"weight_gradient_dot": "dot", "weight_gradient_abs": "dot_abs", "weight_gradient_square": "dot_square"}


@observes(Need.WEIGHT_GRADIENT)
class WeightGradients(Observer):
    """One row for each batch, of the gradient of its mean loss; batches of one sample give rows of samples."""

    runs = "backward"

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self._slices = head_slices(setting.sites)
        self._weights = weights_of(self._slices)
        self._rows: dict[str, dict[str, list[Tensor]]] = {site.name: {name: [] for name in FIELDS} for site in setting.sites}
        self._samples: list[float] = []
        self._grads: dict[int, Tensor | None] = {}
        self._reached: set[str] = set()

    @contextmanager
    def watching_batch(self, batch: Any) -> Iterator[None]:
        before = [(weight, weight.requires_grad, weight.grad) for weight in self._weights]
        try:
            for weight in self._weights:
                weight.grad = None
                weight.requires_grad_(True)
            yield
            self._grads = {id(weight): weight.grad for weight in self._weights}
        finally:
            for weight, trained, grad in before:
                weight.requires_grad_(trained)
                weight.grad = grad

    def after_batch(self, batch: Any, loss: Tensor | None) -> None:
        grads = [self._grads[id(one.weight)] for one in self._slices]
        reached = [grad is not None for grad in grads]
        # The loss of a batch that does not run through a site does not depend on its weights.
        filled = [torch.zeros_like(one.weight) if grad is None else grad for one, grad in zip(self._slices, grads)]
        stats = head_weight_stats(self._slices, filled)
        self._grads = {}
        assert loss is not None  # of a backward pass
        mean = 1.0 / max(loss.numel(), 1)  # the pass differentiates the sum of the losses
        self._samples.append(float(max(loss.numel() if loss.dim() else rows_in(batch), 1)))
        for index, site in enumerate(self.setting.sites):
            own = slice(index * len(ROLES), (index + 1) * len(ROLES))
            if any(reached[own]):
                self._reached.add(site.name)
            for name, statistic in FIELDS.items():
                scale = mean * mean if statistic == "dot_square" else mean
                self._rows[site.name][name].append(scale * rows_of(site, [getattr(one, statistic) for one in stats[own]]))

    def found(self) -> dict[str, dict[str, Tensor]]:
        samples = torch.tensor(self._samples)
        return {
            site.name: {
                name: torch.stack(rows) if rows else torch.zeros(0, len(ROLES), site.head_map.query_heads)
                for name, rows in self._rows[site.name].items()
            }
            | {"weight_gradient_samples": samples}
            for site in self.setting.sites
        }

    def reached(self) -> set[str]:
        return set(self._reached)
