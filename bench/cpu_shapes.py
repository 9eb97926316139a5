"""Random attention inputs on the CPU, laid out as projections leave them, and the peer of ragged layers."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from headprune import HeadMap

GROUPS = (5, 2, 4, 1, 3, 2, 6, 1)  # 24 query heads over 8 key/value heads
RAGGED = HeadMap(tuple(kv for kv, size in enumerate(GROUPS) for _ in range(size)), len(GROUPS))


def tokens(batch: int, length: int, heads: int, dim: int) -> Tensor:
    """[batch, heads, length, dim], token by token."""
    return torch.randn(batch, length, heads, dim).transpose(1, 2)


def rows(batch: int, length: int, dim: int, head_map: HeadMap) -> tuple[Tensor, Tensor, Tensor]:
    """(query, key, value)."""
    heads = (head_map.query_heads, head_map.kv_heads, head_map.kv_heads)
    return tuple(tokens(batch, length, count, dim) for count in heads)


def expanded_sdpa(query: Tensor, key: Tensor, value: Tensor, head_map: HeadMap, **options) -> Tensor:
    """Ragged groups as they are served without us: keys and values copied to every query head."""
    groups = torch.tensor(head_map.kv_of_query)
    return scaled_dot_product_attention(query, key.index_select(1, groups), value.index_select(1, groups), **options)
