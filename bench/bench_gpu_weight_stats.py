"""Statistics of every head's weights on a GPU: all 32 layers of Llama-3-8B's attention in one call.

Shown as a ratio to the per-tensor loop and to one plain read of as many bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor
from weight_shapes import gbyte, llama_layers, per_tensor

from headprune import ops
from headprune.ops import HeadSlices, cuda

pytestmark = pytest.mark.gpu
LAYERS = 32


@cache
def model(dtype: torch.dtype) -> list[HeadSlices]:
    return llama_layers(LAYERS, dtype, "cuda")


def stats(projections: list[HeadSlices], grads: list[Tensor] | None, backend: str | None = None) -> Callable[[], object]:
    def run() -> object:
        if backend is None:
            return ops.head_weight_stats(projections, grads)
        with ops.backend(backend):
            return ops.head_weight_stats(projections, grads)

    return run


def gradients_of(projections: list[HeadSlices], wanted: bool) -> list[Tensor] | None:
    return [torch.randn_like(slices.weight) for slices in projections] if wanted else None


def label(dtype: torch.dtype, grads: bool) -> str:
    return f"{LAYERS} layers of Llama-3-8B, {dtype}{', with gradients' if grads else ''}"


@pytest.mark.parametrize("grads", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_all_layers_in_one_launch(versus, dtype, grads):
    projections = model(dtype)
    given = gradients_of(projections, grads)
    ours, peers = stats(projections, given), per_tensor(projections, given)
    versus(f"weight statistics, {label(dtype, grads)}", ours, peers, at_least=10.0, rounds=7)


@pytest.mark.parametrize("grads", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_share_of_the_read_bandwidth(versus, dtype, grads):
    """torch's own sum of as many bytes, in one fp32 tensor, is what the GPU reads at."""
    projections = model(dtype)
    given = gradients_of(projections, grads)
    large = torch.ones(int(gbyte(projections) * (2 if grads else 1) * 1e9) // 4, device="cuda")
    name = f"weight statistics against one plain read, {label(dtype, grads)}"
    versus(name, stats(projections, given), {"sum of as many bytes": large.sum}, at_most=1 / 0.9, rounds=7)


@pytest.mark.parametrize("grads", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_triton_against_cuda(versus, dtype, grads):
    """Fills headprune/ops/weight_table.py."""
    if cuda.missing() is not None:
        pytest.skip(cuda.missing())
    projections = model(dtype)
    given = gradients_of(projections, grads)
    peers = {"CUDA": stats(projections, given, "cuda")}
    versus(f"weight statistics Triton, {label(dtype, grads)}", stats(projections, given, "triton"), peers, rounds=7)
