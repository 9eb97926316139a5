"""First-order sensitivity of the loss to each head's gate."""

from torch import Tensor

from headprune.scoring.criterion import criterion
from headprune.scoring.observations import Need, SiteObservations


@criterion(
    "gate_gradient",
    needs={Need.GATE_GRADIENT},
    source="Michel, Levy, Neubig 2019, Are Sixteen Heads Really Better than One?, eq. 4",
    cost="one backward pass",
)
def gate_gradient(observed: SiteObservations) -> Tensor:
    """Mean over samples of the absolute gate gradient."""
    return observed.gate_gradient.abs().mean(dim=0)
