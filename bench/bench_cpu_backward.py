"""Forward and backward attention on the CPU, fp32."""

import pytest
import torch
from cpu_shapes import RAGGED, expanded_sdpa, rows
from torch.nn.functional import scaled_dot_product_attention

from headprune import HeadMap
from headprune.ops import attention


def both_passes(function, *leaves):
    """A call of `function` and the gradients of `leaves`."""
    leaves = [leaf.requires_grad_() for leaf in leaves]
    grad = torch.randn_like(function(*leaves))
    return lambda: torch.autograd.grad(function(*leaves), leaves, grad)


@pytest.mark.parametrize("length", [128, 512])
@pytest.mark.parametrize("dim", [32, 64])
def test_encoder(versus, length, dim):
    batch, heads = 8, 12
    tensors = rows(batch, length, dim, HeadMap.uniform(heads))
    versus(
        f"CPU forward + backward, encoder {heads} heads d{dim} S{length} batch {batch}", both_passes(attention, *tensors),
        {"SDPA": both_passes(scaled_dot_product_attention, *tensors)}, at_least=1.0, grad=True,
        gflop=14 * batch * heads * length * length * dim / 1e9,
    )  # fmt: skip


@pytest.mark.parametrize("length", [512, 1024])
def test_ragged(versus, length):
    dim = 128
    tensors = rows(1, length, dim, RAGGED)
    versus(
        f"CPU forward + backward, ragged 24/8 heads d{dim} S{length} causal",
        both_passes(lambda q, k, v: attention(q, k, v, RAGGED, causal=True), *tensors),
        {"expand + SDPA": both_passes(lambda q, k, v: expanded_sdpa(q, k, v, RAGGED, is_causal=True), *tensors)},
        at_least=1.0, grad=True, gflop=7 * RAGGED.query_heads * length * length * dim / 1e9, rounds=7,
    )  # fmt: skip


def test_gate_gradients_on_and_off(versus):
    heads, dim, length = 12, 64, 512
    tensors, gate = rows(4, length, dim, HeadMap.uniform(heads)), torch.ones(4, heads)

    def backward(*leaves):
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        output = attention(*leaves[:3], gate=leaves[3] if len(leaves) == 4 else gate)
        grad = torch.randn_like(output)
        return lambda: torch.autograd.grad(output, leaves, grad, retain_graph=True)

    versus(
        f"CPU backward with gate gradients, {heads} heads d{dim} S{length} batch 4", backward(*tensors, gate),
        {"without": backward(*tensors)}, at_most=1.02, grad=True, rounds=25,
    )  # fmt: skip
