"""Second-order Taylor expansion of the loss in a head's weights."""

from torch import Tensor

from headprune.scoring.batch_means import over_batches
from headprune.scoring.criterion import criterion
from headprune.scoring.observations import Need, SiteObservations


@criterion(
    "taylor_second_order",
    needs={Need.WEIGHT_GRADIENT},
    source="LLM-Pruner, Ma et al. 2023, sec. 3.2, the Hessian by the diagonal Fisher information of the weights",
    cost="one backward pass with gradients of the attentions' weights",
)
def taylor_second_order(observed: SiteObservations) -> Tensor:
    """|-sum w g + sum (w g)^2 / 2|, means over batches by their samples: the change of the loss when the head's weights become 0.

    The Fisher information is that of the batches' mean losses; with batches of one sample it is the usual one.
    """
    first = over_batches(observed.weight_gradient_dot.sum(dim=1), observed)
    second = over_batches(observed.weight_gradient_square.sum(dim=1), observed)
    return (0.5 * second - first).abs()
