"""Weight magnitude: heads whose weights are small are thought to do little."""

from torch import Tensor

from headprune.scoring.criterion import criterion
from headprune.scoring.observations import Need, SiteObservations

SOURCE = "Li et al. 2017, Pruning Filters for Efficient ConvNets, sec. 3.1, by head"


@criterion("magnitude_l1", needs={Need.WEIGHTS}, source=SOURCE, cost="no data")
def magnitude_l1(observed: SiteObservations) -> Tensor:
    """Sum of the L1 norms of the head's query, key, value and output weights; shared key/value heads count by share."""
    return observed.weight_l1.sum(dim=0)


@criterion("magnitude_l2", needs={Need.WEIGHTS}, source=SOURCE, cost="no data")
def magnitude_l2(observed: SiteObservations) -> Tensor:
    """Sum of the L2 norms of the head's query, key, value and output weights; shared key/value heads count by share."""
    return observed.weight_l2.sum(dim=0)


@criterion("magnitude_output", needs={Need.WEIGHTS}, source=SOURCE, cost="no data")
def magnitude_output(observed: SiteObservations) -> Tensor:
    """L2 norm of the head's columns of the output projection alone."""
    return observed.weight_l2[3]


@criterion("magnitude_max", needs={Need.WEIGHTS}, source=SOURCE, cost="no data")
def magnitude_max(observed: SiteObservations) -> Tensor:
    """Largest magnitude among the head's query, key, value and output weights."""
    return observed.weight_max.amax(dim=0)


@criterion("magnitude_l1_mean", needs={Need.WEIGHTS}, source=SOURCE, cost="no data")
def magnitude_l1_mean(observed: SiteObservations) -> Tensor:
    """Mean magnitude of the head's weights: heads of different sizes can be compared."""
    return observed.weight_l1.sum(dim=0) / observed.weight_count.sum(dim=0).clamp(min=1)


@criterion("magnitude_l2_mean", needs={Need.WEIGHTS}, source=SOURCE, cost="no data")
def magnitude_l2_mean(observed: SiteObservations) -> Tensor:
    """Sum of the L2 norms of the head's projections over its number of weights."""
    return observed.weight_l2.sum(dim=0) / observed.weight_count.sum(dim=0).clamp(min=1)
