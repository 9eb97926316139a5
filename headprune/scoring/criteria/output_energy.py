"""How much of the layer's output a head makes."""

from torch import Tensor

from headprune.scoring.activations import diagonal_blocks
from headprune.scoring.criterion import criterion
from headprune.scoring.observations import Need, SiteObservations


@criterion(
    "output_energy",
    needs={Need.GRAM},
    source="Kobayashi et al. 2020, Attention is Not Only a Weight, the norm of eq. 2 squared",
    cost="one forward pass",
)
def output_energy(observed: SiteObservations) -> Tensor:
    """Mean over tokens of ||W_h O_h||^2, the head's own squared share in the layer's output."""
    width = observed.shape.value_dim
    inputs, weights = (diagonal_blocks(matrix, width) for matrix in (observed.input_gram, observed.output_gram))
    return (inputs * weights).sum(dim=(1, 2)) / observed.tokens
