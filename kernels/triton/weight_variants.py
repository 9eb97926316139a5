"""What `make aot` compiles of the weight statistics: two layers of Llama-3-8B's attention, and weights that are not aligned."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from headprune.kernels.launch import AotVariant
from headprune.kernels.weight_stats import weight_stats_launches

SHAPES = ((32, 0), (8, 0), (8, 0), (32, 1))  # heads, and the dimension along which they lie
HIDDEN = 4096


def aot_variants(capability: int) -> Iterator[AotVariant]:
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        for grads in (False, True):
            for width in (64, 128):
                yield variant(dtype, name, grads, width, HIDDEN)
    yield variant(torch.bfloat16, "bf16", True, 81, HIDDEN - 1, "odd")
    totals = launches(torch.bfloat16, True, 128, HIDDEN)[1]
    yield AotVariant("weight_totals", totals, tensor_cores=False)


def variant(dtype: torch.dtype, name: str, grads: bool, width: int, hidden: int, option: str = "") -> AotVariant:
    label = " ".join(["weight_stats", name, f"d{width}", *["gradients"] * grads, *[option] * bool(option)])
    return AotVariant(label, launches(dtype, grads, width, hidden)[0], tensor_cores=False)


def launches(dtype: torch.dtype, grads: bool, width: int, hidden: int) -> list:
    weights, dims, spans, first = [], [], [], 0
    for index, (heads, dim) in enumerate(SHAPES):
        shape = (heads * width, hidden) if dim == 0 else (hidden, heads * width)
        weights.append(torch.empty(shape, device="meta", dtype=dtype))
        dims.append(dim)
        spans.append((index, first, heads, 0, width, width))
        first += heads
    stats = torch.empty((6 if grads else 3, first), device="meta")
    return weight_stats_launches(tuple(weights), tuple(weights) if grads else (), tuple(dims), tuple(spans), stats)
