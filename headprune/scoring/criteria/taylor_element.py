"""First-order Taylor expansion of the loss in each single weight of a head."""

from torch import Tensor

from headprune.scoring.batch_means import over_batches
from headprune.scoring.criterion import criterion
from headprune.scoring.observations import Need, SiteObservations


@criterion(
    "taylor_element",
    needs={Need.WEIGHT_GRADIENT},
    source="LLM-Pruner, Ma et al. 2023, sec. 3.2: first order, element-wise, summed",
    cost="one backward pass with gradients of the attentions' weights",
)
def taylor_element(observed: SiteObservations) -> Tensor:
    """Mean over batches, by their samples, of sum |w dL/dw|: unlike in taylor_weight, no weight of a head makes up for another."""
    return over_batches(observed.weight_gradient_abs.sum(dim=1), observed)
