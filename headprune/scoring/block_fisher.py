"""The Fisher information of all gates of a layer together: what the search for masks rearranges heads by."""

from __future__ import annotations

import torch
from torch import Tensor

from headprune.arguments import check_arguments
from headprune.errors import InvalidInput
from headprune.scoring.observations import Need, Observations


def block_fisher(observed: Observations) -> dict[str, Tensor]:
    """Site name -> fp64 [query_heads, query_heads]: mean over samples of g g^T, g the sample's gate gradients at the site.

    Half of (1 - m)^T F (1 - m) is the rise of the loss that the layer's mask m is predicted to cost (Kwon et al. 2022, A Fast
    Post-Training Pruning Framework for Transformers, sec. 4.2); its diagonal is the criterion "fisher". Empty where a site has no
    heads left. Raises InvalidInput where the gate gradients of a site were not observed.
    """
    check_arguments(block_fisher, locals())
    found = {}
    for name, site in observed.items():
        if not site.shape.head_map.query_heads:
            found[name] = torch.zeros(0, 0, dtype=torch.float64)
            continue
        if not site.has(Need.GATE_GRADIENT) or not len(site.gate_gradient):
            raise InvalidInput(f"the gate gradients of {name} were not observed; observe with needs={{Need.GATE_GRADIENT}}.")
        found[name] = mean_outer_product(site.gate_gradient)
    return found


def mean_outer_product(rows: Tensor) -> Tensor:
    """[samples, heads] -> [heads, heads], fp64: mean of g g^T."""
    rows = rows.double()
    return rows.T @ rows / max(len(rows), 1)
