"""Decode on a GPU: one new token against caches of 4k to 128k keys, 24 query heads left of 32 over 8 key/value heads.

The floor is the cache's bytes at the bandwidth of a large copy. Peers: expanding keys and values to every query head and SDPA
(what a ragged layer needs without us); padding the groups to equal size with dead heads, then SDPA with enable_gqa or
FlexAttention. Each call takes another cache, so that together they do not fit into L2.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from headprune import ops
from headprune.head_map import HeadMap
from headprune.ops import cuda

pytestmark = pytest.mark.gpu
GROUPS = (4, 1, 3, 2, 4, 4, 2, 4)
RAGGED = HeadMap(tuple(kv for kv, size in enumerate(GROUPS) for _ in range(size)), len(GROUPS))
UNIFORM = HeadMap.uniform(32, 8)
KV_HEADS, HEAD_DIM = 8, 128
ROTATED_BYTES = 256 << 20
SHAPES = [(1, 4), (1, 16), (1, 64), (1, 128), (8, 4), (8, 16), (8, 64), (8, 128), (64, 4), (64, 16)]
LONG = [shape for shape in SHAPES if shape[1] >= 64]
WITH_FLEX = [(1, 64), (8, 16)]  # FlexAttention is compiled anew for every shape, which takes seconds: two stand for all


@dataclass(frozen=True)
class Cache:
    key: Tensor
    value: Tensor
    lengths: Tensor


def caches(batch: int, keys: int, lengths: list[int] | None = None) -> list[Cache]:
    """As many as are larger than L2 together."""
    count = math.ceil(ROTATED_BYTES / gbyte(batch, keys) / 1e9)
    full = torch.tensor(lengths or [keys] * batch, dtype=torch.int32, device="cuda")
    make = lambda: torch.randn(batch, KV_HEADS, keys, HEAD_DIM, device="cuda", dtype=torch.bfloat16)  # noqa: E731
    return [Cache(make(), make(), full) for _ in range(count)]


def gbyte(batch: int, keys: int) -> float:
    return 1e-9 * batch * keys * KV_HEADS * HEAD_DIM * 2 * 2


def rotating(held: list[Cache], run: Callable[[Cache], Tensor]) -> Callable[[], Tensor]:
    turns = itertools.cycle(held)
    return lambda: run(next(turns))


def queries(batch: int, heads: int) -> Tensor:
    return torch.randn(batch, heads, 1, HEAD_DIM, device="cuda", dtype=torch.bfloat16)


def decode(query: Tensor, head_map: HeadMap, backend: str | None = None) -> Callable[[Cache], Tensor]:
    def run(held: Cache) -> Tensor:
        if backend is None:
            return ops.attention_decode(query, held.key, held.value, held.lengths, head_map)
        with ops.backend(backend):
            return ops.attention_decode(query, held.key, held.value, held.lengths, head_map)

    return run


def expanding(query: Tensor) -> Callable[[Cache], Tensor]:
    index = torch.tensor(RAGGED.kv_of_query, device="cuda")
    return lambda held: scaled_dot_product_attention(query, held.key.index_select(1, index), held.value.index_select(1, index))


def equal_groups(query: Tensor, with_flex: bool) -> dict[str, Callable[[Cache], Tensor]]:
    peers = {"SDPA enable_gqa": lambda held: scaled_dot_product_attention(query, held.key, held.value, enable_gqa=True)}
    if with_flex:
        peers["FlexAttention"] = lambda held: flex()(query, held.key, held.value, enable_gqa=True)
    return peers


@cache
def flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def label(batch: int, thousands: int) -> str:
    return f"batch {batch}, {thousands}k keys"


@pytest.mark.parametrize(("batch", "thousands"), SHAPES)
def test_ragged_against_expanding(versus, batch, thousands):
    held, query = caches(batch, thousands * 1024), queries(batch, RAGGED.query_heads)
    peers = {"expand + SDPA": rotating(held, expanding(query))}
    ours = rotating(held, decode(query, RAGGED))
    versus(f"decode ragged, {label(batch, thousands)}", ours, peers, at_least=3.0, gbyte=gbyte(batch, thousands * 1024))


@pytest.mark.parametrize(("batch", "thousands"), SHAPES)
def test_ragged_against_padding_with_dead_heads(versus, batch, thousands):
    held, query = caches(batch, thousands * 1024), queries(batch, RAGGED.query_heads)
    padded = queries(batch, UNIFORM.query_heads)
    peers = {f"padded, {name}": rotating(held, run) for name, run in equal_groups(padded, (batch, thousands) in WITH_FLEX).items()}
    of_floor = 0.85 if (batch, thousands) in LONG else None
    ours = rotating(held, decode(query, RAGGED))
    name = f"decode ragged or padded, {label(batch, thousands)}"
    versus(name, ours, peers, of_floor=of_floor, gbyte=gbyte(batch, thousands * 1024))


@pytest.mark.parametrize(("batch", "thousands"), SHAPES)
def test_equal_groups(versus, batch, thousands):
    held, query = caches(batch, thousands * 1024), queries(batch, UNIFORM.query_heads)
    peers = {name: rotating(held, run) for name, run in equal_groups(query, (batch, thousands) in WITH_FLEX).items()}
    ours = rotating(held, decode(query, UNIFORM))
    versus(f"decode 32q/8kv, {label(batch, thousands)}", ours, peers, gbyte=gbyte(batch, thousands * 1024))


@pytest.mark.parametrize(("batch", "thousands"), [(8, 64), (64, 16)])
def test_samples_of_different_lengths(versus, batch, thousands):
    keys = thousands * 1024
    lengths = [keys * (sample + 1) // batch for sample in range(batch)]
    held, query = caches(batch, keys, lengths), queries(batch, RAGGED.query_heads)
    mask = (torch.arange(keys, device="cuda") < held[0].lengths[:, None])[:, None, None]
    index = torch.tensor(RAGGED.kv_of_query, device="cuda")

    def expanded(one: Cache) -> Tensor:
        key, value = one.key.index_select(1, index), one.value.index_select(1, index)
        return scaled_dot_product_attention(query, key, value, attn_mask=mask)

    peers = {"expand + masked SDPA": rotating(held, expanded)}
    ours = rotating(held, decode(query, RAGGED))
    versus(f"decode, lengths up to {label(batch, thousands)}", ours, peers, at_least=3.0, gbyte=gbyte(1, sum(lengths)))


@pytest.mark.parametrize("page", [16, 256])
@pytest.mark.parametrize(("batch", "thousands"), [(8, 16), (8, 64)])
def test_pages_against_a_contiguous_cache(versus, batch, thousands, page):
    keys = thousands * 1024
    held, query = caches(batch, keys), queries(batch, RAGGED.query_heads)
    table = torch.randperm(batch * keys // page, device="cuda").int().reshape(batch, -1)

    def paged(one: Cache) -> Tensor:
        # The same memory seen as pages [pages, page, kv_heads, dim].
        key, value = (tensor.view(-1, page, KV_HEADS, HEAD_DIM).transpose(1, 2) for tensor in (one.key, one.value))
        return ops.attention_decode(query, key, value, one.lengths, RAGGED, page_table=table)

    peers = {"contiguous": rotating(held, decode(query, RAGGED))}
    name = f"decode, pages of {page}, {label(batch, thousands)}"
    versus(name, rotating(held, paged), peers, gbyte=gbyte(batch, keys))


@pytest.mark.parametrize("head_map", [RAGGED, HeadMap.uniform(8), HeadMap.uniform(64, 8)], ids=str)
@pytest.mark.parametrize(("batch", "thousands"), SHAPES)
def test_triton_against_cuda(versus, batch, thousands, head_map):
    """Fills headprune/ops/decode_table.py."""
    if cuda.missing() is not None:
        pytest.skip(cuda.missing())
    held, query = caches(batch, thousands * 1024), queries(batch, head_map.query_heads)
    peers = {"CUDA": rotating(held, decode(query, head_map, "cuda"))}
    ours = rotating(held, decode(query, head_map, "triton"))
    versus(f"decode Triton, {head_map}, {label(batch, thousands)}", ours, peers, gbyte=gbyte(batch, thousands * 1024))
