"""Forward and backward on a GPU: uniform heads against torch's flash SDPA, ragged groups, and what gate gradients cost."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from headprune import ops
from headprune.head_map import HeadMap
from headprune.ops.call import AttentionCall, operands

pytestmark = pytest.mark.gpu
TOKENS = 16384
RAGGED = HeadMap(tuple(kv for kv, size in enumerate((4, 4, 3, 3, 2, 2, 1, 1)) for _ in range(size)), 8)


def tensors(head_map: HeadMap, length: int, dim: int) -> list[torch.Tensor]:
    """query, key, value (which learn) and the output's gradient."""
    counts = (head_map.query_heads, head_map.kv_heads, head_map.kv_heads, head_map.query_heads)
    made = [torch.randn(TOKENS // length, count, length, dim, device="cuda", dtype=torch.bfloat16) for count in counts]
    return [tensor.requires_grad_(index < 3) for index, tensor in enumerate(made)]


def gflop(head_map: HeadMap, length: int, dim: int, causal: bool) -> float:
    """2 matrix products forward and 5 backward."""
    return 7 * 2 * TOKENS * length * dim * head_map.query_heads / (2 if causal else 1) / 1e9


def flash(q, k, v, causal):
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("length", [2048, 4096, 8192, 16384])
def test_uniform_heads(versus, length, dim, causal):
    head_map = HeadMap.uniform(2048 // dim)
    q, k, v, grad = tensors(head_map, length, dim)
    versus(
        f"forward + backward, d {dim}, {length}, {'causal' if causal else 'full'}",
        lambda: torch.autograd.grad(ops.attention(q, k, v, head_map, causal=causal), (q, k, v), grad),
        {"flash SDPA": lambda: torch.autograd.grad(flash(q, k, v, causal), (q, k, v), grad)},
        dtype=torch.bfloat16, at_least=1.1, gflop=gflop(head_map, length, dim, causal), grad=True,
    )  # fmt: skip


@pytest.mark.parametrize("length", [2048, 8192])
def test_ragged_groups(versus, length):
    q, k, v, grad = tensors(RAGGED, length, 128)
    index = torch.tensor(RAGGED.kv_of_query, device="cuda")

    def expanded():
        return torch.autograd.grad(flash(q, k.index_select(1, index), v.index_select(1, index), True), (q, k, v), grad)

    versus(
        f"forward + backward, ragged, d 128, {length}, causal",
        lambda: torch.autograd.grad(ops.attention(q, k, v, RAGGED, causal=True), (q, k, v), grad),
        {"expand + flash SDPA": expanded},
        dtype=torch.bfloat16, at_least=1.25, gflop=gflop(RAGGED, length, 128, True), grad=True,
    )  # fmt: skip


@pytest.mark.parametrize("length", [2048, 8192])
def test_gate_gradients(versus, length):
    """The backward operator itself, without autograd, so that it replays in a CUDA graph."""
    head_map = HeadMap.uniform(16)
    q, k, v, grad = (tensor.detach() for tensor in tensors(head_map, length, 128))
    gate = torch.ones(TOKENS // length, 16, device="cuda")
    call = AttentionCall(
        q, k, v, head_map, causal=True, window=0, scale=128**-0.5, softcap=0.0, bias=None, alibi_slopes=None, sinks=None,
        key_mask=None, query_mask=None, gate=gate, stats=False,
    )  # fmt: skip
    output, lse, _ = torch.ops.headprune.attention(*operands(call))

    def backward(of_gate):
        return lambda: torch.ops.headprune.attention_backward(
            grad, output, lse, [True, True, True, False, False, of_gate], *operands(call)
        )

    versus(
        f"backward with gate gradients, d 128, {length}, causal", backward(True), {"ourselves without": backward(False)},
        at_most=1.02,
    )  # fmt: skip
