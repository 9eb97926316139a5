"""First-order Taylor expansion of the loss in each single weight of a head."""

from torch import Tensor

from headprune.scoring.criterion import criterion
from headprune.scoring.observations import Need, SiteObservations


@criterion(
    "taylor_element",
    needs={Need.WEIGHT_GRADIENT},
    source="LLM-Pruner, Ma et al. 2023, sec. 3.2: first order, element-wise, summed",
    cost="one backward pass with gradients of the attentions' weights",
)
def taylor_element(observed: SiteObservations) -> Tensor:
    """Mean over batches of sum |w dL/dw|: unlike taylor_weight, weights of a head cannot make up for each other."""
    return observed.weight_gradient_abs.sum(dim=1).mean(dim=0)
