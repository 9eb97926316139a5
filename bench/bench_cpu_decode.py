"""Decode attention on the CPU: one new token against a cache."""

import pytest
import torch
from cpu_shapes import RAGGED, expanded_sdpa
from torch.nn.functional import scaled_dot_product_attention

from headprune.ops import attention_decode


def cache(dtype: torch.dtype, batch: int = 4, length: int = 4096, dim: int = 128, heads: int = 24, kv_heads: int = 8):
    """(query, key cache, value cache, lengths, gigabytes of the cache)."""
    query = torch.randn(batch, heads, 1, dim).to(dtype)
    key, value = (torch.randn(batch, kv_heads, length, dim).to(dtype) for _ in range(2))
    gbyte = 2 * key.numel() * key.element_size() / 1e9
    return query, key, value, torch.full((batch,), length, dtype=torch.int32), gbyte


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ragged(versus, dtype):
    q, k, v, lengths, gbyte = cache(dtype)
    versus(
        f"CPU decode, ragged 24/8 heads d128, cache 4096, batch 4, {dtype}", lambda: attention_decode(q, k, v, lengths, RAGGED),
        {"expand + SDPA": lambda: expanded_sdpa(q, k, v, RAGGED)}, at_least=10, of_floor=0.8, gbyte=gbyte, rounds=9, dtype=dtype,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_uniform(versus, dtype):
    q, k, v, lengths, gbyte = cache(dtype)
    versus(
        f"CPU decode, 24/8 heads d128, cache 4096, batch 4, {dtype}", lambda: attention_decode(q, k, v, lengths),
        {"SDPA enable_gqa": lambda: scaled_dot_product_attention(q, k, v, enable_gqa=True)}, at_least=1.0, gbyte=gbyte, dtype=dtype,
    )  # fmt: skip
