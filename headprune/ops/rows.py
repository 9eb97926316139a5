"""Attention probabilities a few rows at a time, so that no whole matrix is in memory: for measurements, not for speed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from headprune.ops.call import AttentionCall
from headprune.ops.reference import key_positions, probabilities, query_positions

BLOCK_ELEMENTS = 1 << 22  # of probabilities: 16 MiB in fp32


@dataclass(frozen=True)
class Rows:
    """Some query rows of one sample. probs: fp32 [query_heads, rows, kv_len] (fp64 for an fp64 model); ahead: int64
    [rows, kv_len], the key's position minus the query's; queries: the rows' numbers."""

    sample: int
    queries: slice
    probs: Tensor
    ahead: Tensor


def row_blocks(call: AttentionCall) -> Iterator[Rows]:
    """Every row of every sample, as many at once as BLOCK_ELEMENTS allows."""
    size = max(1, BLOCK_ELEMENTS // max(1, call.query_heads * call.kv_len))
    for sample in range(call.batch):
        for start in range(0, call.query_len, size):
            yield rows_of(call, sample, slice(start, min(start + size, call.query_len)))


def rows_of(call: AttentionCall, sample: int, queries: slice) -> Rows:
    ahead = key_positions(call)[None, :] - query_positions(call)[queries, None]
    hidden = torch.zeros_like(ahead, dtype=torch.bool)
    if call.causal:
        hidden = ahead > 0
    if call.window:
        hidden = hidden | (ahead.abs() >= call.window)
    bias = torch.zeros_like(ahead, dtype=torch.promote_types(call.query.dtype, torch.float32)).masked_fill(hidden, float("-inf"))
    if call.alibi_slopes is not None:
        bias = bias - call.alibi_slopes.to(bias.dtype)[:, None, None] * ahead.abs()
    if call.bias is not None:
        given = call.bias.expand(call.batch, call.query_heads, call.query_len, call.kv_len)[sample, :, queries]
        bias = bias.masked_fill(~given, float("-inf")) if given.dtype == torch.bool else bias + given.to(bias.dtype)
    own = slice(sample, sample + 1)
    one = replace(
        call, query=call.query[own, :, queries], key=call.key[own], value=call.value[own], causal=False, window=0,
        alibi_slopes=None, bias=bias, key_mask=None if call.key_mask is None else call.key_mask[own], query_mask=None,
        gate=None, stats=False,
    )  # fmt: skip
    return Rows(sample, queries, probabilities(one)[4][0], ahead)
