"""Llama-3-8B's attention weights, and the peer: PyTorch, one projection at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from headprune.ops import HeadSlices

HIDDEN, HEADS, KV_HEADS, WIDTH = 4096, 32, 8, 128


def llama_layers(layers: int, dtype: torch.dtype, device: str = "cpu") -> list[HeadSlices]:
    """The query, key, value and output projection of `layers` layers."""
    weight = lambda rows, columns: torch.randn(rows, columns, device=device, dtype=dtype)  # noqa: E731
    return [
        slices
        for _ in range(layers)
        for slices in (
            HeadSlices.contiguous(weight(HEADS * WIDTH, HIDDEN), HEADS, WIDTH),
            HeadSlices.contiguous(weight(KV_HEADS * WIDTH, HIDDEN), KV_HEADS, WIDTH),
            HeadSlices.contiguous(weight(KV_HEADS * WIDTH, HIDDEN), KV_HEADS, WIDTH),
            HeadSlices.contiguous(weight(HIDDEN, HEADS * WIDTH), HEADS, WIDTH, dim=1),
        )
    ]


def gbyte(projections: list[HeadSlices]) -> float:
    return sum(slices.weight.nbytes for slices in projections) / 1e9


def per_tensor(projections: list[HeadSlices], grads: list[Tensor] | None = None) -> dict[str, Callable[[], object]]:
    """The two ways that PyTorch offers: reductions that read the weight as it is, and a widened copy."""
    return {
        "vector_norm per tensor": lambda: [by_norms(slices, grads and grads[i]) for i, slices in enumerate(projections)],
        "widened per tensor": lambda: [by_widening(slices, grads and grads[i]) for i, slices in enumerate(projections)],
    }


def by_head(slices: HeadSlices, tensor: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """`tensor` with the heads in a dimension of their own, and the dimensions to reduce."""
    split = tensor.unflatten(slices.dim, (slices.heads, -1))
    return split, ((1, 2) if slices.dim == 0 else (0, 2))


def by_norms(slices: HeadSlices, grad: Tensor | None) -> list[Tensor]:
    w, over = by_head(slices, slices.weight)
    norm = lambda x, p: torch.linalg.vector_norm(x, p, dim=over, dtype=torch.float32)  # noqa: E731
    found = [norm(w, 1), norm(w, 2), w.abs().amax(over)]
    if grad is not None:
        product = w * by_head(slices, grad)[0]
        found += [product.sum(over, dtype=torch.float32), norm(product, 1), norm(product, 2)]
    return found


def by_widening(slices: HeadSlices, grad: Tensor | None) -> list[Tensor]:
    w, over = by_head(slices, slices.weight.float())
    size = w.abs()
    found = [size.sum(over), w.square().sum(over), size.amax(over)]
    if grad is not None:
        product = w * by_head(slices, grad.float())[0]
        found += [product.sum(over), product.abs().sum(over), product.square().sum(over)]
    return found
