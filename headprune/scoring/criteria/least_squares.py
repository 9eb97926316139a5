"""What a layer loses when a head goes and the heads that stay take over all that least squares lets them.

A head counts for what the others cannot replace, as compensation (`headprune.surgery.compensate`) will ask them to.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headprune.scoring.activations import diagonal_blocks, input_covariance
from headprune.scoring.criterion import criterion
from headprune.scoring.observations import Need, SiteObservations

RIDGE = 1e-3  # of the Gram's mean diagonal: directions that the data hardly shows are not relied on
STEP = 1e-6  # by which a score at least exceeds that of the head before it


@criterion(
    "least_squares",
    needs={Need.GRAM},
    source="Optimal Brain Surgeon by head: Hassibi & Stork 1993; ZipLM, Kurtic et al. 2023; SlimGPT, Ling et al. 2024",
    cost="one forward pass and one matrix inverse per layer",
)
def least_squares(observed: SiteObservations) -> Tensor:
    """Share of the layer's output lost with the head after the best re-solve, in greedy order of removal.

    The shares of a layer sum to 1 unless a later head is cheaper than one before it: scores never fall along the order,
    so that a ranking takes the heads in it.
    """
    heads, gram = observed.shape.head_map.query_heads, regression_gram(observed)
    if not gram.isfinite().all():  # which no factorisation goes through
        return torch.full((heads,), torch.nan)
    order, costs = removal_costs(gram, observed.output_gram, heads)
    shares = torch.zeros(heads, dtype=torch.float64)
    total, last = max(sum(costs), torch.finfo(torch.float32).tiny), 0.0
    for head, cost in zip(order, costs):
        last = max(cost / total, last * (1 + STEP))
        shares[head] = last
    return shares.float()


@criterion(
    "fisher_least_squares",
    needs={Need.GRAM, Need.GATE_GRADIENT},
    source="least_squares within a layer, Kwon et al. 2022, eq. 9, between layers",
    cost="one backward pass and one matrix inverse per layer",
)
def fisher_least_squares(observed: SiteObservations) -> Tensor:
    """Least-squares share of the head times the root of the Fisher information of all its layer's gates.

    The root, the norm of the layer's gate gradients, ranked layers better than the information itself on validation pairs.
    """
    layer = observed.gate_gradient.square().mean(dim=0).sum().sqrt()
    return least_squares(observed) * layer


@criterion(
    "least_squares_by_head",
    needs={Need.GRAM},
    source="Optimal Brain Surgeon by head: Hassibi & Stork 1993; ZipLM, Kurtic et al. 2023, eq. 4",
    cost="one forward pass and one matrix inverse per layer",
)
def least_squares_by_head(observed: SiteObservations) -> Tensor:
    """Squared error of the layer's output, per token, when this head alone goes and the others are re-solved."""
    gram, width = regression_gram(observed), observed.shape.value_dim
    if not gram.isfinite().all():
        return torch.full((observed.shape.head_map.query_heads,), torch.nan)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
    found = torch.linalg.solve(diagonal_blocks(inverse, width), diagonal_blocks(observed.output_gram, width))
    errors: Tensor = found.diagonal(dim1=1, dim2=2).sum(dim=1)
    return errors.clamp(min=0)


def regression_gram(observed: SiteObservations) -> Tensor:
    """[features, features], fp64, ridge added: E[x x^T] of the projection's inputs, about the mean where a bias takes it up."""
    gram = input_covariance(observed) if observed.shape.output_bias else observed.input_gram / observed.tokens
    damping = (RIDGE * gram.diagonal().mean()).clamp(min=torch.finfo(torch.float32).tiny)
    return gram + damping * torch.eye(len(gram), dtype=gram.dtype)


def removal_costs(gram: Tensor, output_gram: Tensor, heads: int) -> tuple[list[int], list[float]]:
    """Heads in greedy order of removal, and by how much each one raises the layer's least squared error.

    gram: G = E[x x^T] [features, features], positive definite. output_gram: W^T W, of the same shape; head h owns the
    h-th of `heads` equal blocks. With P = G^-1, removing h costs tr(W_h [P_hh]^-1 W_h^T) and leaves
    W <- W - W_h [P_hh]^-1 P_h:, P <- P - P_:h [P_hh]^-1 P_h:.
    """
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
    width = len(gram) // heads
    left, order, costs = list(range(heads)), [], []
    while left:
        found = torch.linalg.solve(diagonal_blocks(inverse, width)[left], diagonal_blocks(output_gram, width)[left])
        losses = found.diagonal(dim1=1, dim2=2).sum(dim=1)
        head = left.pop(int(losses.argmin()))
        order.append(head)
        costs.append(max(float(losses.min()), 0.0))
        own = slice(head * width, (head + 1) * width)
        taken = torch.linalg.solve(inverse[own, own], inverse[own])  # [P_hh]^-1 P_h:
        cross = output_gram[:, own] @ taken
        output_gram = output_gram - cross - cross.T + taken.T @ output_gram[own, own] @ taken
        inverse = inverse - inverse[:, own] @ taken
    return order, costs
