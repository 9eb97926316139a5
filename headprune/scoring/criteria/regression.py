"""A linear model of the loss over random sets of heads, whose coefficients are the heads' scores."""

from __future__ import annotations

import torch
from torch import Tensor

from headprune.scoring.criterion import criterion
from headprune.scoring.observations import Need, Observations

RIDGES = torch.logspace(-6, 2, 25, dtype=torch.float64)  # of the mean squared singular value; the best is chosen


@criterion(
    "regression",
    needs={Need.MASK_TRIALS},
    source="Dery et al. 2024, Everybody Prune Now (Bonsai), sec. 3: ridge regression of the loss on random masks",
    cost="64 forward passes a batch, whatever the number of heads",
    whole_model=True,
)
def regression(observed: Observations) -> dict[str, Tensor]:
    """Loss increase per removed head, by ridge regression over random masks; the ridge by generalised cross-validation.

    Trials on larger batches weigh more. Changes of the loss are regressed, as batches differ in their dense loss.
    """
    sites = list(observed.values())
    if not sites:
        return {}
    masks = torch.cat([site.trial_masks for site in sites], dim=1).double()
    coefficients = ridge(1 - masks, sites[0].trial_changes.double(), sites[0].trial_samples.double())
    counts = [site.shape.head_map.query_heads for site in sites]
    return {site.name: part.float() for site, part in zip(sites, coefficients.split(counts))}


def ridge(inputs: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Coefficients [features] of targets [n] on inputs [n, features], with an intercept that is not shrunk.

    The ridge minimises n |residual|^2 / (n - 1 - degrees of freedom)^2 (Golub, Heath & Wahba 1979).
    """
    weights = weights / weights.sum()
    root = (len(targets) * weights).sqrt()
    x, y = root[:, None] * (inputs - weights @ inputs), root * (targets - weights @ targets)
    u, s, vt = torch.linalg.svd(x, full_matrices=False)
    projected, outside = u.T @ y, (y - u @ (u.T @ y)).square().sum()
    ridges = RIDGES * s.square().mean().clamp(min=torch.finfo(torch.float64).tiny)
    shrunk = s.square() / (s.square() + ridges[:, None])  # [ridges, singular values]
    residual = outside + ((1 - shrunk) * projected).square().sum(dim=1)
    freedom = (len(y) - 1 - shrunk.sum(dim=1)).clamp(min=1e-9)
    best = int((residual / freedom.square()).argmin())
    return vt.T @ (projected * s / (s.square() + ridges[best]))
