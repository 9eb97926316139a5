"""Statistics of each head's attention pattern: sums over the rows of a tile, then over tiles, in a fixed order.

A tile writes seven numbers: the sums over its counted rows of entropy, largest probability, first key's mass, distance and output
norm, the largest logit, and how many rows count. A second kernel adds the tiles up, so that no atomic makes two runs differ.
"""

from __future__ import annotations

from torch import Tensor

import triton
import triton.language as tl
from headprune.kernels.launch import Launch

FIELDS = 7
_LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def store_empty_tile(partial_ptr, stride):
    """What a tile without a counted row writes: 0, and -inf as the largest logit."""
    for field in tl.static_range(7):
        tl.store(partial_ptr + field * stride, float("-inf") if field == 1 else 0.0)


@triton.jit
def store_tile(partial_ptr, stride, counted, entropy, top, max_prob, first_mass, distance, norm):
    """Sums over `counted` rows. entropy in bits and top (the largest score) in base 2, all [M]."""
    store_sum(partial_ptr, counted, entropy * _LN2)
    one = tl.arange(0, 1)
    tl.store(partial_ptr + stride + one, tl.max(tl.where(counted, top * _LN2, float("-inf"))[None, :], 1))
    store_sum(partial_ptr + 2 * stride, counted, max_prob)
    store_sum(partial_ptr + 3 * stride, counted, first_mass)
    store_sum(partial_ptr + 4 * stride, counted, distance)
    store_sum(partial_ptr + 5 * stride, counted, norm)
    store_sum(partial_ptr + 6 * stride, counted, tl.where(counted, 1.0, 0.0))


@triton.jit
def store_sum(ptr, counted, values):
    # Reduced as one row of a matrix: with a reduction of the vector itself to a scalar, Triton 3.6 and 3.7 fail on sm_100 (their
    # pass optimize-tmem-layouts follows the accumulator into it and asks for a layout of rank 0).
    tl.store(ptr + tl.arange(0, 1), tl.sum(tl.where(counted, values, 0.0)[None, :], 1))


@triton.jit
def total(ptr, blocks, BLOCK: tl.constexpr):
    sums = tl.zeros([BLOCK], tl.float32)
    for at in tl.range(0, blocks, BLOCK):
        index = at + tl.arange(0, BLOCK)
        sums += tl.load(ptr + index, mask=index < blocks, other=0.0)
    return tl.sum(sums, 0)


@triton.jit
def largest(ptr, blocks, BLOCK: tl.constexpr):
    found = tl.full([BLOCK], float("-inf"), tl.float32)
    for at in tl.range(0, blocks, BLOCK):
        index = at + tl.arange(0, BLOCK)
        found = tl.maximum(found, tl.load(ptr + index, mask=index < blocks, other=float("-inf")))
    return tl.max(found, 0)


@triton.jit(do_not_specialize=["heads", "pairs", "blocks"])
def head_statistics_kernel(
    partial_ptr, stats_ptr, cu_q_ptr, heads, pairs, blocks, BLOCK_M: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    pair = tl.program_id(0)
    used = blocks
    if cu_q_ptr is not None:
        # Blocks behind a sequence's end were never written.
        sample = pair // heads
        used = tl.cdiv(tl.load(cu_q_ptr + sample + 1) - tl.load(cu_q_ptr + sample), BLOCK_M)
    plane = pairs.to(tl.int64) * blocks
    ptr = partial_ptr + pair.to(tl.int64) * blocks
    rows = tl.maximum(total(ptr + 6 * plane, used, BLOCK), 1.0)
    tl.store(stats_ptr + pair, total(ptr, used, BLOCK) / rows)
    tl.store(stats_ptr + pairs + pair, total(ptr + 2 * plane, used, BLOCK) / rows)
    tl.store(stats_ptr + 2 * pairs + pair, largest(ptr + plane, used, BLOCK))
    tl.store(stats_ptr + 3 * pairs + pair, total(ptr + 3 * plane, used, BLOCK) / rows)
    tl.store(stats_ptr + 4 * pairs + pair, total(ptr + 4 * plane, used, BLOCK) / rows)
    tl.store(stats_ptr + 5 * pairs + pair, total(ptr + 5 * plane, used, BLOCK) / rows)


def empty_partials(stats: Tensor, blocks: int) -> Tensor:
    """Where the tiles of stats [6, samples, heads] write: fp32 [FIELDS, samples, heads, blocks]."""
    return stats.new_empty((FIELDS, *stats.shape[1:], blocks))


def statistics_launch(partials: Tensor, stats: Tensor, block_m: int, cu_seqlens_q: Tensor | None) -> Launch:
    """Fills stats [6, samples, heads] (the order of HeadStats) from `partials` [FIELDS, samples, heads, blocks]."""
    _, samples, heads, blocks = partials.shape
    arguments = {
        "partial_ptr": partials, "stats_ptr": stats, "cu_q_ptr": cu_seqlens_q, "heads": heads, "pairs": samples * heads,
        "blocks": blocks,
    }  # fmt: skip
    return Launch(head_statistics_kernel, (samples * heads,), arguments, {"BLOCK_M": block_m, "BLOCK": 64}, warps=1, stages=1)
