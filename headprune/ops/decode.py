"""Decode attention, a few new tokens against a cache: schema and fake. What computes it is chosen in `backend.py`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from headprune.arguments import explained
from headprune.errors import InvalidInput
from headprune.head_map import HeadMap
from headprune.ops.at_once import run_operator
from headprune.ops.attention import head_map_of, library
from headprune.ops.backend import choose
from headprune.ops.call import BATCHED, DecodeCall, check_alike, check_decode, default_scale, equal_groups

library.define(
    "attention_decode(Tensor query, Tensor key_cache, Tensor value_cache, Tensor lengths, Tensor? page_table, int[] kv_of_query, "
    "int window, float scale, float softcap, Tensor? alibi_slopes, Tensor? sinks, Tensor? key_mask, Tensor? gate) -> Tensor"
)


@explained
def attention_decode(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    lengths: Tensor,
    head_map: HeadMap | None = None,
    *,
    page_table: Tensor | None = None,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    key_mask: Tensor | None = None,
    gate: Tensor | None = None,
) -> Tensor:
    """1 to 8 new tokens of each sample against its cache, which already holds their own keys and values.

    Args:
        query: [batch, query_heads, new, head_dim]; the last query stands at position lengths - 1, and is causal.
        key_cache, value_cache: [batch, kv_heads, capacity, dim]; with a page_table [pages, kv_heads, page_size, dim]; any
            strides, so that a cache kept as [pages, page_size, kv_heads, dim] is given as `cache.transpose(1, 2)`.
        lengths: int32 [batch], keys of each sample, the new ones included; what lies behind them is never read.
        page_table: int32 [batch, pages_per_sample]: page p of a sample holds its keys p * page_size and on.
        window: keys nearer than this many positions are seen, the query's own counted; None or 0: all.
        key_mask: bool [batch, capacity (or pages_per_sample * page_size)], for left-padded batches.
        scale, softcap, alibi_slopes, sinks, gate: as in `headprune.ops.attention`.

    Returns: [batch, query_heads, new, value_dim], laid out token by token; a query with nothing to attend to gives 0.

    Not differentiable. Raises InvalidInput for shapes, dtypes or options that do not fit each other, and for tensors that
    require gradients outside torch.no_grad().
    """
    check_alike({"query": query, "key_cache": key_cache, "value_cache": value_cache}, BATCHED)
    head_map = equal_groups(query.shape[1], key_cache.shape[1]) if head_map is None else head_map
    differentiable = (query, key_cache, value_cache, sinks, gate)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in differentiable):
        raise InvalidInput("attention_decode has no gradient; use attention, or call it under torch.no_grad().")
    call = check_decode(
        DecodeCall(
            query,
            key_cache,
            value_cache,
            lengths,
            page_table,
            head_map,
            window or 0,
            default_scale(query) if scale is None else scale,
            softcap or 0.0,
            alibi_slopes,
            sinks,
            key_mask,
            gate,
        )
    )
    output: Tensor = run_operator("attention_decode", call)
    return output


def as_decode_call(query: Tensor, key_cache: Tensor, value_cache: Tensor, *rest: Any) -> DecodeCall:
    lengths, page_table, kv_of_query, *options = rest
    head_map = head_map_of(tuple(kv_of_query), key_cache.shape[1])
    return DecodeCall(query, key_cache, value_cache, lengths, page_table, head_map, *options)


def _run(*args: Any) -> Tensor:
    call = as_decode_call(*args)
    output: Tensor = choose("attention_decode", call).run(call)
    return output


def _fake(*args: Any) -> Tensor:
    query: Tensor = args[0]
    batch, heads, new, _ = query.shape
    return query.new_empty((batch, new, heads, args[2].shape[3])).transpose(1, 2)


for _device in ("CPU", "CUDA"):
    library.impl("attention_decode", _run, _device)
torch.library.register_fake("headprune::attention_decode", _fake, lib=library)
