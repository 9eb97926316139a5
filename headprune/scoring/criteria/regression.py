"""A linear model of the loss over random sets of heads, whose coefficients are the heads' scores."""

from __future__ import annotations

import torch
from torch import Tensor

from headprune.scoring.criterion import criterion
from headprune.scoring.observations import Need, Observations

RIDGES = torch.logspace(-6, 2, 25, dtype=torch.float64)  # of the mean eigenvalue; the best is chosen


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
    eigenvalues, vectors = torch.linalg.eigh(x.T @ x)
    eigenvalues, projected = eigenvalues.clamp(min=0), vectors.T @ (x.T @ y)
    ridges = RIDGES * eigenvalues.mean().clamp(min=torch.finfo(torch.float64).tiny)
    damped = 1 / (eigenvalues + ridges[:, None])  # [ridges, eigenvalues]
    explained = (projected.square() * (2 * damped - eigenvalues * damped.square())).sum(dim=1)
    freedom = (len(y) - 1 - (eigenvalues * damped).sum(dim=1)).clamp(min=1e-9)
    best = int(((y.square().sum() - explained).clamp(min=0) / freedom.square()).argmin())
    coefficients: Tensor = vectors @ (projected * damped[best])
    return coefficients
