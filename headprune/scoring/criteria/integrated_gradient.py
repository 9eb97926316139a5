"""Gate gradients added up on the way from closed heads to open ones."""

from torch import Tensor

from headprune.scoring.criterion import criterion
from headprune.scoring.observations import Need, SiteObservations


@criterion(
    "integrated_gradient",
    needs={Need.INTEGRATED_GRADIENT},
    source="Hao et al. 2021, Self-Attention Attribution (AttAttr), eq. 4, on gates of heads; Sundararajan et al. 2017",
    cost="9 forward and backward passes",
)
def integrated_gradient(observed: SiteObservations) -> Tensor:
    """Mean over samples of minus the integral of dL/dgate with all gates of the model at alpha, alpha from 0 to 1.

    Over all heads the scores sum to the mean loss without any head less the one with all. Hao et al. scale one layer's
    attention at a time and take the largest entry of the map as the head's; here the gates of all layers go together.
    """
    return -observed.integrated_gradient.mean(dim=0)
