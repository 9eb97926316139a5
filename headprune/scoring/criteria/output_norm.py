"""How much each head puts out."""

from torch import Tensor

from headprune.scoring.criterion import criterion
from headprune.scoring.observations import Need, SiteObservations


@criterion(
    "output_norm",
    needs={Need.OUTPUT_NORM},
    source="Kobayashi et al. 2020, Attention is Not Only a Weight: Analyzing Transformers with Vector Norms",
    cost="one forward pass",
)
def output_norm(observed: SiteObservations) -> Tensor:
    """Mean length of what the head adds to its layer's output, ||O_h W_h^T||, over tokens, then sequences."""
    return observed.projected_norm.mean(dim=0)


@criterion(
    "activation_norm",
    needs={Need.ATTENTION},
    source="Muralidharan et al. 2024, Compact Language Models via Pruning and Knowledge Distillation (Minitron), sec. 2.2",
    cost="one forward pass",
)
def activation_norm(observed: SiteObservations) -> Tensor:
    """Mean length of the head's output before the output projection, ||O_h||, over tokens, then sequences."""
    return observed.output_norm.mean(dim=0)
