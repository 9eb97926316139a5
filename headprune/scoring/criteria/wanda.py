"""Weights times the size of what they multiply."""

from torch import Tensor

from headprune.scoring.activations import by_head
from headprune.scoring.criterion import criterion
from headprune.scoring.observations import Need, SiteObservations


@criterion(
    "wanda",
    needs={Need.GRAM},
    source="Sun et al. 2023, A Simple and Effective Pruning Approach for LLMs, eq. 1; by head as Wanda-sp in An et al. 2024",
    cost="one forward pass",
)
def wanda(observed: SiteObservations) -> Tensor:
    """Sum over the head's columns c of the output projection of ||x_c||_2 sum_r |W_rc|; the norm is over valid tokens."""
    return by_head(observed.output_l1 * observed.input_gram.diagonal().sqrt(), observed).sum(dim=1)
