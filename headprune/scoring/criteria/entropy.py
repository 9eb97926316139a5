"""How spread out each head's attention is."""

from torch import Tensor

from headprune.scoring.criterion import criterion
from headprune.scoring.observations import Need, SiteObservations

SOURCE = "entropy of attention rows, as in Voita et al. 2019, Analyzing Multi-Head Self-Attention, and Zhai et al. 2023"
COST = "one forward pass"


@criterion("entropy", needs={Need.ATTENTION}, source=SOURCE, cost=COST)
def entropy(observed: SiteObservations) -> Tensor:
    """Minus the mean entropy of the head's attention (nats), over tokens, then sequences: focused heads stay."""
    return -observed.entropy.mean(dim=0)


@criterion("entropy_inverted", needs={Need.ATTENTION}, source=SOURCE, cost=COST)
def entropy_inverted(observed: SiteObservations) -> Tensor:
    """The mean entropy itself: heads that gather from many tokens stay."""
    return observed.entropy.mean(dim=0)
