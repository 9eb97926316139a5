"""Heads whose output another head of the layer gives as well."""

import torch
from torch import Tensor

from headprune.scoring.activations import by_head, head_similarity, input_covariance
from headprune.scoring.criterion import criterion
from headprune.scoring.observations import Need, SiteObservations

SOURCE = "linear CKA: Kornblith et al. 2019, Similarity of Neural Network Representations Revisited, eq. 4"


@criterion("redundancy", needs={Need.GRAM}, source=f"{SOURCE}; Bian et al. 2021", cost="one forward pass")
def redundancy(observed: SiteObservations) -> Tensor:
    """1 - the largest similarity to another head of the layer; 0 for a constant head, which a bias can give instead."""
    similarity, varies = head_similarity(observed), varying(observed)
    return varies * (1.0 - similarity.fill_diagonal_(0.0).amax(dim=1)) if len(similarity) else similarity.new_zeros(0)


@criterion("redundancy_mean", needs={Need.GRAM}, source=f"{SOURCE}; Bian et al. 2021", cost="one forward pass")
def redundancy_mean(observed: SiteObservations) -> Tensor:
    """1 - the mean similarity to the other heads of the layer; 0 for a constant head, which a bias can give instead."""
    similarity = head_similarity(observed).fill_diagonal_(0.0)
    return varying(observed) * (1.0 - similarity.sum(dim=1) / max(len(similarity) - 1, 1))


def varying(observed: SiteObservations) -> Tensor:
    """[query_heads]: 0 for the heads whose output is the same for every token, else 1."""
    variance = by_head(input_covariance(observed).diagonal(), observed).sum(dim=1)
    return variance.sign()


@criterion(
    "diversity",
    needs={Need.GRAM},
    source=f"{SOURCE}; greedy facility location: Nemhauser, Wolsey, Fisher 1978",
    cost="one forward pass",
)
def diversity(observed: SiteObservations) -> Tensor:
    """What the head adds to how well the heads chosen before it stand for all heads of the layer, in greedy order.

    Facility location: a set S stands for the layer by sum_i max_{j in S} CKA(i, j); gains never grow along the order, so the best
    k heads by this score are the greedy choice of k, at least 1 - 1/e as good as the best one.
    """
    return facility_location_gains(head_similarity(observed))


def facility_location_gains(similarity: Tensor) -> Tensor:
    """[n, n] non-negative -> [n]: the gain with which each element is chosen."""
    gains, covered = similarity.new_zeros(len(similarity)), similarity.new_zeros(len(similarity))
    left = list(range(len(similarity)))
    while left:
        candidates = (similarity[left] - covered).clamp(min=0).sum(dim=1)
        best = int(candidates.argmax())
        head = left.pop(best)
        gains[head] = candidates[best]
        covered = torch.maximum(covered, similarity[head])
    return gains
