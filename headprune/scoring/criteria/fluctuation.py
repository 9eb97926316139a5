"""How much a head's output varies: what is constant a bias can give instead."""

from torch import Tensor

from headprune.scoring.activations import by_head, input_covariance
from headprune.scoring.criterion import criterion
from headprune.scoring.observations import Need, SiteObservations

SOURCE = "An et al. 2024, Fluctuation-based Adaptive Structured Pruning (FLAP), eq. 5 and 6"


@criterion("fluctuation", needs={Need.GRAM}, source=SOURCE, cost="one forward pass")
def fluctuation(observed: SiteObservations) -> Tensor:
    """Sum over the head's columns c of the output projection of Var(x_c) ||W_c||^2, standardised within the layer.

    The standard score (x - mean) / deviation of a layer's heads is what FLAP ranks over the model.
    """
    raw = fluctuation_raw(observed)
    return (raw - raw.mean()) / raw.std(correction=0).clamp(min=1e-12)


@criterion("fluctuation_raw", needs={Need.GRAM}, source=SOURCE, cost="one forward pass")
def fluctuation_raw(observed: SiteObservations) -> Tensor:
    """Sum over the head's columns c of the output projection of Var(x_c) ||W_c||^2, as it is."""
    return by_head(input_covariance(observed).diagonal() * observed.output_gram.diagonal(), observed).sum(dim=1)
