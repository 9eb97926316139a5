"""Shapley values of heads: what each one's removal costs, averaged over the orders in which heads can go."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def permutation_marginals(
    losses: Callable[[Tensor], Tensor], dense: float, heads: int, permutations: int, generator: torch.Generator, stop: float = 0.0
) -> Tensor:
    """Samples orders of removal: [permutations, heads], fp64, the rise of the loss when each head goes in each order.

    losses(masks [n, heads]) gives the loss of each mask, [n]; `dense` is that with all heads. A row sums to the loss without
    any head less the dense one. Its mean over rows is the Shapley value (Castro et al. 2009).
    stop: an order ends once its loss is this near to that without any head, as a share of the whole way (truncated Monte
    Carlo: Ghorbani & Zou 2019); the heads left then share what is left evenly. 0: every order is run to its end.
    """
    orders = torch.stack([torch.randperm(heads, generator=generator) for _ in range(permutations)])
    empty = float(losses(torch.zeros(1, heads)))
    marginals = torch.zeros(permutations, heads, dtype=torch.float64)
    current = torch.full((permutations,), dense, dtype=torch.float64)
    going, block = torch.arange(permutations), max(1, heads // 8) if stop else heads
    for start in range(0, heads, block):
        removed = orders[going, start : start + block]
        masks = torch.stack(
            [after_removal(orders[going], count) for count in range(start + 1, start + removed.shape[1] + 1)], dim=1
        )
        reached = losses(masks.flatten(0, 1)).double().view(len(going), -1)
        steps = torch.cat([current[going, None], reached], dim=1).diff(dim=1)
        marginals[going] = marginals[going].scatter(1, removed, steps)
        current[going] = reached[:, -1]
        left = orders[:, start + block :]
        done = going[(current[going] - empty).abs() <= stop * abs(empty - dense)] if stop and left.shape[1] else going[:0]
        for order in done.tolist():
            marginals[order, left[order]] = (empty - current[order]) / left.shape[1]
        going = going[~torch.isin(going, done)]
        if not len(going):
            break
    return marginals


def after_removal(orders: Tensor, count: int) -> Tensor:
    """[orders, heads]: 0 for the first `count` heads of each order, else 1."""
    masks = torch.ones(orders.shape)
    return masks.scatter_(1, orders[:, :count], 0.0)
