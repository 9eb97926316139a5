"""First-order Taylor expansion of the loss in a head's weights."""

from torch import Tensor

from headprune.scoring.batch_means import over_batches
from headprune.scoring.criterion import criterion
from headprune.scoring.observations import Need, SiteObservations


@criterion(
    "taylor_weight",
    needs={Need.WEIGHT_GRADIENT},
    source="Molchanov et al. 2019, Importance Estimation for Neural Network Pruning, of a group; the vector-wise form of "
    "LLM-Pruner, Ma et al. 2023, sec. 3.2",
    cost="one backward pass with gradients of the attentions' weights",
)
def taylor_weight(observed: SiteObservations) -> Tensor:
    """Mean over batches, by their samples, of |sum w dL/dw| over the head's query, key, value and output weights."""
    return over_batches(observed.weight_gradient_dot.sum(dim=1).abs(), observed)
