"""Heads that look where another head of their layer looks."""

import torch
from torch import Tensor

from headprune.scoring.criterion import criterion
from headprune.scoring.observations import Need, SiteObservations

STEP = 1e-6  # by which a score at least exceeds that of the head before it


@criterion(
    "attention_redundancy",
    needs={Need.ATTENTION_DISTANCE},
    source="Clark et al. 2019, What Does BERT Look At?, sec. 6; Bian et al. 2021, On Attention Redundancy",
    cost="one slow forward pass",
)
def attention_redundancy(observed: SiteObservations) -> Tensor:
    """Jensen-Shannon divergence (nats) from the most alike head that is still there, in greedy order of removal.

    Of the closest pair the one goes first that is closer to all the others, so that one of two twins stays. Scores never
    fall along the order; the last head of a layer scores ln 2, the largest divergence there is.
    """
    return removal_scores(observed.distance_sum / observed.distance_rows.clamp(min=1))


def removal_scores(distances: Tensor) -> Tensor:
    """fp32 [heads], from symmetric distances [heads, heads]; NaN where one of them is."""
    if distances.isnan().any():
        return torch.full((len(distances),), torch.nan)
    left = list(range(len(distances)))
    scores = torch.full((len(distances),), float(torch.tensor(2.0).log()))
    last = 0.0
    while len(left) > 1:
        among = distances[left][:, left]
        apart = among + torch.diag(torch.full((len(left),), torch.inf, dtype=among.dtype))
        nearest, total = apart.amin(dim=1), among.sum(dim=1)
        closest = nearest.min()
        head = min((index for index in range(len(left)) if nearest[index] == closest), key=lambda index: float(total[index]))
        last = max(float(closest), last * (1 + STEP))
        scores[left.pop(head)] = last
    return scores
