"""Movement pruning: heads whose weights shrink while the model is trained are given up."""

from torch import Tensor

from headprune.scoring.criterion import criterion
from headprune.scoring.observations import Need, SiteObservations


@criterion(
    "movement",
    needs={Need.MOVEMENT},
    source="Sanh, Wolf, Rush 2020, Movement Pruning; by block in Lagunas et al. 2021",
    cost="training, recorded by MovementRecorder",
)
def movement(observed: SiteObservations) -> Tensor:
    """-sum over training steps of sum w dL/dw, over the head's query, key, value and output weights; signed."""
    return observed.movement.sum(dim=0)
