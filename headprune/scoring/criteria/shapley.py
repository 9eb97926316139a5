"""What the head's removal costs on average over all orders of removal: a fair share of what all heads do together."""

from __future__ import annotations

from statistics import NormalDist

import torch
from torch import Tensor

from headprune.scoring.criterion import criterion
from headprune.scoring.observations import Need, SiteObservations


@criterion(
    "shapley",
    needs={Need.SHAPLEY},
    source="Held & Yang 2023, Shapley Head Pruning; sampled as by Castro et al. 2009, truncated as by Ghorbani & Zou 2019",
    cost="a forward pass per head in each of 8 random orders a batch",
)
def shapley(observed: SiteObservations) -> Tensor:
    """Mean over random orders of the loss increase when the head goes in that order; orders of larger batches weigh more."""
    weights = observed.shapley_samples.double()
    return (weights @ observed.shapley.double() / weights.sum()).float()


def shapley_interval(observed: SiteObservations, confidence: float = 0.95) -> tuple[Tensor, Tensor]:
    """Lower and upper bounds of the Shapley values, [query_heads] each, by the normal approximation over the sampled orders.

    NaN where only one order was sampled. The interval is of the sampling of orders on this data, not of the choice of data.
    """
    weights = observed.shapley_samples.double() / observed.shapley_samples.double().sum()
    rows, mean = observed.shapley.double(), weights @ observed.shapley.double()
    variance = (weights.square() @ (rows - mean).square()) / (1 - weights.square().sum())
    width = NormalDist().inv_cdf((1 + confidence) / 2) * variance.sqrt()
    if len(rows) < 2:
        width = torch.full_like(mean, torch.nan)
    return (mean - width).float(), (mean + width).float()
