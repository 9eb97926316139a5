"""Means over what is observed once a batch."""

from __future__ import annotations

from torch import Tensor

from headprune.scoring.observations import SiteObservations


def over_batches(rows: Tensor, observed: SiteObservations) -> Tensor:
    """[batches, ...] -> [...]: the mean of what is observed of weight gradients. A batch counts by its samples, so the last one
    of a data set, of few, counts for few."""
    samples = observed.weight_gradient_samples
    if samples is None or len(samples) != len(rows):  # observed by an earlier version
        return rows.mean(dim=0)
    weights = samples / samples.sum()
    return (rows * weights.view(-1, *[1] * (rows.dim() - 1))).sum(dim=0)
