"""Decode attention on the CPU: one new token against a cache."""

import pytest
import torch
from cpu_shapes import RAGGED, expanded_sdpa
from torch.nn.functional import scaled_dot_product_attention

from headprune.ops import attention_decode

LENGTH, DIM, BATCH = 4096, 128, 4
PAGE = 16


def cache(dtype: torch.dtype, batch: int = BATCH, length: int = LENGTH, dim: int = DIM, heads: int = 24, kv_heads: int = 8):
    """(query, key cache, value cache, lengths, a sum over as many bytes as the cache has)."""
    query = torch.randn(batch, heads, 1, dim).to(dtype)
    key, value = (torch.randn(batch, kv_heads, length, dim).to(dtype) for _ in range(2))
    words = torch.randn((key.nbytes + value.nbytes) // 4)
    return query, key, value, torch.full((batch,), length, dtype=torch.int32), words.sum


def in_pages(rows: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """[batch, kv_heads, length, dim] as pages [pages, kv_heads, PAGE, dim], page p of a sample at order[sample, p]."""
    batch, heads, _, dim = rows.shape
    pages = rows.new_empty(order.numel(), heads, PAGE, dim)
    pages[order.flatten()] = rows.reshape(batch, heads, -1, PAGE, dim).transpose(1, 2).flatten(0, 1)
    return pages


def gathered(pages: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    return pages[table].transpose(1, 2).flatten(2, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ragged(versus, dtype):
    q, k, v, lengths, reads = cache(dtype)
    versus(
        f"CPU decode, ragged 24/8 heads d128, cache 4096, batch 4, {dtype}", lambda: attention_decode(q, k, v, lengths, RAGGED),
        {"expand + SDPA": lambda: expanded_sdpa(q, k, v, RAGGED)}, at_least=10, of_floor=0.8, reads=reads,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_uniform(versus, dtype):
    q, k, v, lengths, reads = cache(dtype)
    versus(
        f"CPU decode, 24/8 heads d128, cache 4096, batch 4, {dtype}", lambda: attention_decode(q, k, v, lengths),
        {"SDPA enable_gqa": lambda: scaled_dot_product_attention(q, k, v, enable_gqa=True)}, at_least=1.0, of_floor=0.8,
        reads=reads,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_paged(versus, dtype):
    q, k, v, lengths, reads = cache(dtype)
    table = torch.randperm(BATCH * LENGTH // PAGE).reshape(BATCH, -1)
    k, v, pages = in_pages(k, table), in_pages(v, table), table.int()
    versus(
        f"CPU decode, ragged 24/8 heads d128, cache 4096 in pages of {PAGE}, batch 4, {dtype}",
        lambda: attention_decode(q, k, v, lengths, RAGGED, page_table=pages),
        {"gather + expand + SDPA": lambda: expanded_sdpa(q, gathered(k, table), gathered(v, table), RAGGED)},
        at_least=10, of_floor=0.8, reads=reads,
    )  # fmt: skip
