"""Second-order sensitivity of the loss to each head's gate."""

from torch import Tensor

from headprune.scoring.criterion import criterion
from headprune.scoring.observations import Need, SiteObservations


@criterion(
    "fisher",
    needs={Need.GATE_GRADIENT},
    source="Kwon et al. 2022, A Fast Post-Training Pruning Framework for Transformers, eq. 9",
    cost="one backward pass",
)
def fisher(observed: SiteObservations) -> Tensor:
    """Mean over samples of the squared gate gradient: the diagonal empirical Fisher information of the gates."""
    return observed.gate_gradient.square().mean(dim=0)
