"""Forward attention on a GPU (GOALS.md): uniform heads through the plain Triton kernel; ragged groups, statistics and pruned
against dense through what runs by default, on Hopper the warp-specialised kernel of bench_gpu_hopper.py."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from headprune import HeadMap
from headprune.ops import attention, backend

DTYPE = torch.bfloat16
TOKENS = 16384  # batch * length of every row up to that length
PRUNED = (31, 27, 24, 17)  # of 32 query heads over 8 key/value heads
FLEX_LENGTH = 8192  # FlexAttention is compiled anew for every shape, which takes seconds: one length stands for all


def inputs(batch: int, length: int, heads: int, kv_heads: int, dim: int, device: str = "cuda") -> tuple[Tensor, Tensor, Tensor]:
    """Query, key, value as projections leave them: [batch, heads, length, dim], token by token."""
    return tuple(
        torch.randn(batch, length, count, dim, device=device, dtype=DTYPE if device == "cuda" else torch.float32).transpose(1, 2)
        for count in (heads, kv_heads, kv_heads)
    )


def plain(query: Tensor, key: Tensor, value: Tensor, head_map: HeadMap, **options) -> Callable[[], object]:
    def run():
        with backend("triton"):
            return attention(query, key, value, head_map, **options)

    return run


def ours(query: Tensor, key: Tensor, value: Tensor, head_map: HeadMap, **options) -> Callable[[], object]:
    return lambda: attention(query, key, value, head_map, **options)


def sdpa(kind: SDPBackend, query: Tensor, key: Tensor, value: Tensor, **options) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with sdpa_kernel(kind):
            return scaled_dot_product_attention(query, key, value, **options)

    return run


def expanded_sdpa(kind: SDPBackend, query: Tensor, key: Tensor, value: Tensor, head_map: HeadMap, causal: bool):
    """What a ragged layer costs today: every query head gets a copy of its keys and values."""
    groups = torch.tensor(head_map.kv_of_query, device=query.device)

    def run() -> Tensor:
        with sdpa_kernel(kind):
            return scaled_dot_product_attention(
                query, key.index_select(1, groups), value.index_select(1, groups), is_causal=causal
            )  # fmt: skip

    return run


def causal_mask(_batch, _head, query_index, key_index):
    return query_index >= key_index


def flex(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Callable[[], Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    length = query.shape[2]
    mask = create_block_mask(causal_mask, None, None, length, length, device=query.device) if causal else None
    compiled = compiled_flex(flex_attention)
    return lambda: compiled(query, key, value, block_mask=mask, enable_gqa=query.shape[1] != key.shape[1])


@functools.cache
def compiled_flex(flex_attention: Callable) -> Callable:
    return torch.compile(flex_attention, dynamic=False)


def gflop(batch: int, heads: int, length: int, dim: int, causal: bool) -> float:
    return (2 if causal else 4) * batch * heads * length * length * dim * 1e-9


def randomly_pruned(kept: int, heads: int = 32, kv_heads: int = 8) -> HeadMap:
    """A fixed random choice of `kept` query heads: groups of unlike sizes, as a score leaves them."""
    generator = torch.Generator().manual_seed(kept)
    chosen = torch.randperm(heads, generator=generator)[:kept].sort().values
    return HeadMap.uniform(heads, kv_heads).keep(chosen.tolist())


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("length", [2048, 4096, 8192, 16384, 32768])
def test_uniform_heads(versus, length, dim, causal):
    heads, batch = 2048 // dim, max(1, TOKENS // length)
    tensors = inputs(batch, length, heads, heads, dim)
    versus(
        f"forward plain Triton {heads} heads d{dim} S{length} batch {batch}{' causal' * causal}",
        plain(*tensors, HeadMap.uniform(heads), causal=causal),
        {
            "flash SDPA": sdpa(SDPBackend.FLASH_ATTENTION, *tensors, is_causal=causal),
            "cuDNN SDPA": sdpa(SDPBackend.CUDNN_ATTENTION, *tensors, is_causal=causal),
            **({"FlexAttention": flex(*tensors, causal)} if length == FLEX_LENGTH else {}),
        },
        dtype=DTYPE, at_least=0.9 if dim == 64 else None, gflop=gflop(batch, heads, length, dim, causal),
    )  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("length", [2048, 8192, 32768])
def test_uniform_heads_against_flash(versus, length, dim):
    heads, batch = 2048 // dim, max(1, TOKENS // length)
    tensors = inputs(batch, length, heads, heads, dim)
    versus(
        f"forward plain Triton {heads} heads d{dim} S{length} batch {batch} causal against flash alone",
        plain(*tensors, HeadMap.uniform(heads), causal=True),
        {"flash SDPA": sdpa(SDPBackend.FLASH_ATTENTION, *tensors, is_causal=True)},
        dtype=DTYPE, at_least=1.2, gflop=gflop(batch, heads, length, dim, True),
    )  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("kept", PRUNED)
@pytest.mark.parametrize("length", [4096, 16384])
def test_ragged_groups(versus, length, kept):
    head_map, batch, dim = randomly_pruned(kept), max(1, TOKENS // length), 128
    tensors = inputs(batch, length, head_map.query_heads, head_map.kv_heads, dim)
    versus(
        f"forward ragged {kept}/{head_map.kv_heads} heads d{dim} S{length} causal vs expand",
        ours(*tensors, head_map, causal=True),
        {
            "expand + flash SDPA": expanded_sdpa(SDPBackend.FLASH_ATTENTION, *tensors, head_map, True),
            "expand + cuDNN SDPA": expanded_sdpa(SDPBackend.CUDNN_ATTENTION, *tensors, head_map, True),
        },
        dtype=DTYPE, at_least=1.25, gflop=gflop(batch, kept, length, dim, True),
    )  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dim", [64, 128])
def test_statistics(versus, dim, causal):
    heads, length, batch = 2048 // dim, 4096, 4
    tensors = inputs(batch, length, heads, heads, dim)
    head_map = HeadMap.uniform(heads)
    versus(
        f"forward with statistics {heads} heads d{dim} S{length}{' causal' * causal}",
        ours(*tensors, head_map, causal=causal, stats=True),
        {"ours without": ours(*tensors, head_map, causal=causal)},
        dtype=DTYPE, at_most=1.10, gflop=gflop(batch, heads, length, dim, causal),
    )  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("kept", [*PRUNED, 8])
def test_pruned_against_dense(versus, kept):
    """Time must fall with the heads: at most 8 % above kept / 32 of the dense layer's."""
    batch, length, dim = 4, 4096, 128
    dense, pruned = HeadMap.uniform(32, 8), randomly_pruned(kept)
    versus(
        f"forward pruned to {kept} of 32 heads d{dim} S{length} causal",
        ours(*inputs(batch, length, pruned.query_heads, pruned.kv_heads, dim), pruned, causal=True),
        {"ours dense": ours(*inputs(batch, length, 32, 8, dim), dense, causal=True)},
        dtype=DTYPE, at_most=1.08 * kept / 32, gflop=gflop(batch, kept, length, dim, True),
    )  # fmt: skip
