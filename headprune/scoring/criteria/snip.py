"""Connection sensitivity."""

import torch
from torch import Tensor

from headprune.scoring.batch_means import over_batches
from headprune.scoring.criterion import criterion
from headprune.scoring.observations import Need, Observations


@criterion(
    "snip",
    needs={Need.WEIGHT_GRADIENT},
    source="Lee, Ajanthan, Torr 2019, SNIP: Single-shot Network Pruning based on Connection Sensitivity, by head",
    cost="one backward pass with gradients of the attentions' weights",
    whole_model=True,
)
def snip(observed: Observations) -> dict[str, Tensor]:
    """Sum |w dL/dw| of the head's weights, as a share of that of all attentions; of several batches the mean, by their samples."""
    sums = {name: over_batches(site.weight_gradient_abs.sum(dim=1), site) for name, site in observed.items()}
    total = torch.stack([values.sum() for values in sums.values()]).sum().clamp(min=torch.finfo(torch.float32).tiny)
    return {name: values / total for name, values in sums.items()}
