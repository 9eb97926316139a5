"""Statistics of every head's weights, of a whole model at once: schema and fake. What computes them is chosen in `backend.py`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from headprune.arguments import explained
from headprune.ops.attention import library
from headprune.ops.backend import choose
from headprune.ops.weight_slices import GRADIENT_STATISTICS, STATISTICS, HeadSlices, WeightCall, WeightStats, check_slices

# spans: six numbers each (weight_slices.Span). grads is empty or has one for each weight.
library.define("head_weight_stats(Tensor[] weights, Tensor[] grads, int[] dims, int[] spans, int heads) -> Tensor")


@explained
def head_weight_stats(weights: Sequence[HeadSlices], grads: Sequence[Tensor] | None = None) -> list[WeightStats]:
    """L1 norm, sum of squares, largest magnitude and, with gradients, products of weight and gradient, of every head.

    Each weight is read once, all of one dtype and device in one launch: give it the projections of the whole model.

    Args:
        weights: the projections; fp32, bf16 or fp16 (fp64 through the reference), any strides, each its own layout of heads.
        grads: a gradient for each, of its weight's shape, dtype and device.

    Returns one WeightStats for each projection, on its device; two calls give the same bits. Products are formed in fp32 (a
        (w g)^2 below 1e-38 is 0). Not differentiable.

    Raises InvalidInput where a span lies outside its weight or a gradient is not like its weight.
    """
    check_slices(weights, grads)
    alike: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for index, slices in enumerate(weights):
        alike.setdefault((slices.weight.device, slices.weight.dtype), []).append(index)
    found: dict[int, WeightStats] = {}
    for indices in alike.values():
        call = WeightCall.of([weights[i] for i in indices], [grads[i] for i in indices] if grads is not None else [])
        packed = torch.ops.headprune.head_weight_stats(*weight_operands(call))
        sizes = [weights[i].heads for i in indices]
        for i, columns, counts in zip(indices, packed.split(sizes, dim=1), call.counts().split(sizes)):
            norm, square, largest, *products = columns.unbind(0)
            found[i] = WeightStats(norm, square, largest, counts, *products)
    return [found[i] for i in range(len(weights))]


def weight_operands(call: WeightCall) -> tuple[Any, ...]:
    return list(call.weights), list(call.grads), list(call.dims), call.flat_spans(), call.heads


def as_weight_call(weights: list[Tensor], grads: list[Tensor], dims: list[int], spans: list[int], heads: int) -> WeightCall:
    rows = (spans[at : at + 6] for at in range(0, len(spans), 6))
    whole = tuple((weight, head, count, start, stride, width) for weight, head, count, start, stride, width in rows)
    return WeightCall(tuple(weights), tuple(grads), tuple(dims), whole, heads)


def _run(*args: Any) -> Tensor:
    call = as_weight_call(*args)
    if not call.heads or not call.spans:
        return call.weights[0].new_zeros((call.statistics, call.heads), dtype=torch.float32)
    packed: Tensor = choose("head_weight_stats", call).run(call)
    return packed


def _fake(weights: list[Tensor], grads: list[Tensor], dims: list[int], spans: list[int], heads: int) -> Tensor:
    return weights[0].new_empty((GRADIENT_STATISTICS if grads else STATISTICS, heads), dtype=torch.float32)


for _device in ("CPU", "CUDA"):
    library.impl("head_weight_stats", _run, _device)
torch.library.register_fake("headprune::head_weight_stats", _fake, lib=library)
