"""Whether a head rests on the first token, and how near it looks."""

from torch import Tensor

from headprune.scoring.criterion import criterion
from headprune.scoring.observations import Need, SiteObservations


@criterion(
    "first_token_mass",
    needs={Need.ATTENTION},
    source="Xiao et al. 2024, Efficient Streaming Language Models with Attention Sinks",
    cost="one forward pass",
)
def first_token_mass(observed: SiteObservations) -> Tensor:
    """Mean attention on all tokens but the first: a head that rests on the first token reads nothing and goes."""
    return 1 - observed.first_mass.mean(dim=0)


@criterion(
    "locality",
    needs={Need.ATTENTION},
    source="positional heads: Voita et al. 2019, Analyzing Multi-Head Self-Attention, sec. 5.1",
    cost="one forward pass",
)
def locality(observed: SiteObservations) -> Tensor:
    """Minus the mean distance attended over, in tokens: heads that look nearby stay."""
    return -observed.distance.mean(dim=0)
