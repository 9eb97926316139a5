"""Which queries see a block of keys and which keys a block of queries, as spans of whole tiles.

A tile is full where each of its queries sees each of its keys by position (causal, window): it needs no mask. A span lies in
start .. stop; its tiles, aligned to their own size, are edge tiles up to full_start, full tiles up to full_stop, and edge tiles
again. Query i stands at position i + kv_len - q_len among the keys.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sequence(sample, cu_ptr, length):
    """(first row, int64; rows) of one sample: 0 and `length`, or what cu_seqlens says where it is given."""
    start = tl.cast(0, tl.int64)
    if cu_ptr is not None:
        first = tl.load(cu_ptr + sample)
        length = tl.load(cu_ptr + sample + 1) - first
        start = first.to(tl.int64)
    return start, length


@triton.jit
def query_span(n0, q_len, kv_len, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(start, full_start, full_stop, stop) of the queries that see keys [n0, n0 + BLOCK_N), in tiles of BLOCK_M."""
    shift = kv_len - q_len
    last = tl.minimum(n0 + BLOCK_N, kv_len) - 1
    start, full_start, full_stop, stop = 0, 0, q_len, q_len
    if CAUSAL:
        start, full_start = n0 - shift, last - shift
    if WINDOW:
        stop, full_stop = tl.minimum(last + window - shift, q_len), tl.minimum(n0 + window - shift, q_len)
        if not CAUSAL:
            start, full_start = n0 - window - shift + 1, last - window - shift + 1
    return whole_tiles(start, full_start, full_stop, stop, BLOCK_M)


@triton.jit
def key_span(m0, q_len, kv_len, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(start, full_start, full_stop, stop) of the keys that queries [m0, m0 + BLOCK_M) see, in tiles of BLOCK_N."""
    first = m0 + kv_len - q_len
    last = tl.minimum(m0 + BLOCK_M, q_len) - 1 + kv_len - q_len
    start, full_start, full_stop, stop = 0, 0, kv_len, kv_len
    if CAUSAL:
        stop, full_stop = tl.minimum(last + 1, kv_len), tl.minimum(first + 1, kv_len)
    if WINDOW:
        start, full_start = first - window + 1, last - window + 1
        if not CAUSAL:
            stop, full_stop = tl.minimum(last + window, kv_len), tl.minimum(first + window, kv_len)
    return whole_tiles(start, full_start, full_stop, stop, BLOCK_N)


@triton.jit
def whole_tiles(start, full_start, full_stop, stop, TILE: tl.constexpr):
    """The bounds in order, those of the full tiles at multiples of TILE."""
    start = tl.maximum(start, 0)
    stop = tl.maximum(stop, start)
    full_start = tl.cdiv(tl.maximum(full_start, 0), TILE) * TILE
    full_stop = tl.maximum(tl.maximum(full_stop, 0) // TILE * TILE, full_start)
    return start, full_start, full_stop, stop


@triton.jit
def tile_count(start, full_start, full_stop, stop, EDGE: tl.constexpr, TILE: tl.constexpr):
    """How many full tiles a span has, or how many edge tiles."""
    if EDGE:
        count = leading_tiles(start, full_start, stop, TILE) + tl.cdiv(tl.maximum(stop - full_stop, 0), TILE)
    else:
        count = (full_stop - full_start) // TILE
    return count


@triton.jit
def tile_start(index, start, full_start, full_stop, stop, EDGE: tl.constexpr, TILE: tl.constexpr):
    """Where the `index`-th full (or edge) tile of a span begins."""
    if EDGE:
        leading = leading_tiles(start, full_start, stop, TILE)
        first = tl.where(index < leading, start // TILE * TILE + index * TILE, full_stop + (index - leading) * TILE)
    else:
        first = full_start + index * TILE
    return first


@triton.jit
def leading_tiles(start, full_start, stop, TILE: tl.constexpr):
    """The edge tiles before the full ones; none in an empty span."""
    return tl.where(stop > start, tl.cdiv(tl.minimum(full_start, stop), TILE) - start // TILE, 0)
