"""Statistics of every head's weights on the CPU: two layers of Llama-3-8B's attention in one call."""

import pytest
import torch
from weight_shapes import gbyte, llama_layers, per_tensor

from headprune.ops import head_weight_stats


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights(versus, dtype):
    projections = llama_layers(2, dtype)
    versus(
        f"CPU weight statistics, 2 layers of Llama-3-8B, {dtype}", lambda: head_weight_stats(projections), per_tensor(projections),
        at_least=5.0, of_floor=0.8, gbyte=gbyte(projections), rounds=5, dtype=dtype,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_and_gradients(versus, dtype):
    projections = llama_layers(1, dtype)
    grads = [torch.randn_like(slices.weight) for slices in projections]
    versus(
        f"CPU weight and gradient statistics, 1 layer of Llama-3-8B, {dtype}", lambda: head_weight_stats(projections, grads),
        per_tensor(projections, grads), at_least=5.0, of_floor=0.8, gbyte=2 * gbyte(projections), rounds=5, dtype=dtype,
    )  # fmt: skip
