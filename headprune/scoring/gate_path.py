"""Gradients of the loss with respect to every head's gate, where the gates are not all open."""

from __future__ import annotations

import torch
from numpy.polynomial.legendre import leggauss
from torch import Tensor

from headprune.errors import InvalidInput
from headprune.scoring.masked_losses import MaskedBatch, Masks


def gate_gradients(found: MaskedBatch, masks: Masks) -> dict[str, Tensor]:
    """dL_n/dgate at each mask: site -> [n_masks, samples, query_heads], fp32, on the CPU, for all sites that are reached.

    Samples are the rows of the model's call. The gradients of a mean loss are scaled up by their number; where masks cannot
    be folded into the batch a sample's gradient is not known by itself, and each sample has their mean.
    """
    folds = found.structure is not None
    parts = found.parts(found.checked(masks), rows=None if folds else 1)
    with found.owner.still(grad=True):
        pieces = [by_sample(found, part) if folds else of_all_samples(found, part) for part in parts]
    return {name: torch.cat([piece[name] for piece in pieces]) for name in found.reached}


def by_sample(found: MaskedBatch, gates: dict[str, Tensor]) -> dict[str, Tensor]:
    times = len(next(iter(gates.values())))
    leaves = {name: rows.repeat_interleave(found.samples, dim=0).requires_grad_() for name, rows in gates.items()}
    losses = [found.owner.losses_of(output, found.batch) for output in found.folded_pass(leaves, times)]
    grads = differentiated(losses, leaves, found.samples)
    return {name: grad.view(times, found.samples, -1) for name, grad in grads.items()}


def of_all_samples(found: MaskedBatch, gates: dict[str, Tensor]) -> dict[str, Tensor]:
    leaves = {name: rows[0].clone().requires_grad_() for name, rows in gates.items()}
    grads = differentiated([found.owner.alone(found.batch, leaves)], leaves, found.samples)
    return {name: (grad / found.samples).expand(1, found.samples, -1) for name, grad in grads.items()}


def differentiated(losses: list[Tensor], leaves: dict[str, Tensor], samples: int) -> dict[str, Tensor]:
    total = torch.stack([loss.sum() if loss.dim() else loss * samples for loss in losses]).sum()
    if not torch.isfinite(total):
        raise InvalidInput("the loss is NaN or infinite on a batch; look for empty labels or overflow in low precision.")
    if not total.requires_grad:
        raise InvalidInput("the loss does not depend on any attention head; is it computed under torch.no_grad()?")
    return dict(zip(leaves, torch.autograd.grad(total, list(leaves.values()), allow_unused=True, materialize_grads=True)))


def integrated_gradients(found: MaskedBatch, points: int) -> dict[str, Tensor]:
    """Integral over alpha from 0 to 1 of dL_n/dgate with all gates at alpha, by the Gauss-Legendre rule of so many `points`:
    site -> [samples, query_heads]. Over all heads of the model it sums to L_n(all open) - L_n(all closed)."""
    nodes, weights = map(torch.from_numpy, leggauss(points))  # of the integral from -1 to 1
    alphas, weights = (nodes.float() + 1) / 2, weights.float() / 2
    heads = {name: found.owner.sites[name].head_map.query_heads for name in found.reached}
    gradients = gate_gradients(found, {name: alphas[:, None].expand(-1, count) for name, count in heads.items()})
    return {name: torch.einsum("p,psh->sh", weights, rows) for name, rows in gradients.items()}
