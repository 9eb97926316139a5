"""What the loss is without the head."""

from torch import Tensor

from headprune.scoring.criterion import criterion
from headprune.scoring.observations import Need, SiteObservations


@criterion(
    "ablation",
    needs={Need.ABLATION},
    source="Michel, Levy, Neubig 2019, Are Sixteen Heads Really Better than One?, sec. 3.2, by the loss",
    cost="one forward pass per head, about half of it reused",
)
def ablation(observed: SiteObservations) -> Tensor:
    """Mean over samples of the loss with the head removed less the loss with all heads."""
    return observed.ablation.mean(dim=0)
