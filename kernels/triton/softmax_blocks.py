"""The key loop of the forward kernel: the online softmax over blocks of keys, with the sums that the statistics need."""

from __future__ import annotations

import triton
import triton.language as tl

from headprune.kernels.scores import biased, capped, dot_parts, key_mask_row, load_part, visible_tile, with_alibi


@triton.jit
def attend_to_keys(
    state, start, stop, low, high, q_0, q_1, k_base, v_base, mask_base, bias_base, stride_kn, stride_vn, stride_mn, stride_bm,
    stride_bn, row_start, q_len, kv_len, window, scale, softcap, slope,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, D_0: tl.constexpr, D_1: tl.constexpr, V_0: tl.constexpr, V_1: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    ALIBI: tl.constexpr, BIAS: tl.constexpr, HAS_MASK: tl.constexpr, FOLD_SCALE: tl.constexpr, PRECISE: tl.constexpr,
    STATS: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """`state` after the keys start .. stop; start is a multiple of BLOCK_N.

    state: (m, l, acc_0, acc_1, e, d), all relative to the running maximum m (base 2): l = sum p, acc = sum p v (two parts of the
    value's columns), and with STATS e = sum p * (s - m), d = sum p * distance. With CAUSAL d is the sum of p * (key's position -
    first query's position), one multiplication less; the caller turns it round.
    EDGE: some of these keys may be hidden from some of the queries. Otherwise all are visible to all and nothing is masked.
    low .. high are the keys that some query of the tile may see: outside, values are not read.
    """
    m_i, l_i, acc_0, acc_1, e_i, d_i = state
    queries = tl.arange(0, BLOCK_M)
    keys = tl.arange(0, BLOCK_N)
    rows = row_start + queries
    offset = kv_len - q_len
    for at in tl.range(start, stop, BLOCK_N):
        cols = at + keys
        far = tl.cast(at, tl.int64)
        k_block = k_base + far * stride_kn
        v_block = v_base + far * stride_vn
        inside = cols < kv_len
        k_0 = load_part(k_block, keys, stride_kn, inside, 0, D_0, HEAD_DIM, EDGE)
        k_1 = k_0
        if D_1 > 0:
            k_1 = load_part(k_block, keys, stride_kn, inside, D_0, D_1, HEAD_DIM, EDGE)
        s = dot_parts(q_0, q_1, k_0, k_1, D_1)
        if not FOLD_SCALE:
            s = capped(s, scale, softcap, SOFTCAP, PRECISE)
        if ALIBI:
            s = with_alibi(s, rows[:, None], cols[None, :], offset, slope)
        read = inside
        if EDGE:
            read = (cols >= low) & (cols < high)
            seen = visible_tile(rows[:, None], cols[None, :], q_len, kv_len, window, CAUSAL, WINDOW)
            if HAS_MASK:
                unmasked = key_mask_row(mask_base, cols, stride_mn, kv_len)
                read = read & unmasked
                seen = seen & unmasked[None, :]
            if BIAS > 0:
                bias_block = bias_base + far * stride_bn
                s, seen = biased(s, seen, bias_block + queries[:, None] * stride_bm + keys[None, :] * stride_bn, BIAS)
                # What no query sees may hold NaN, and 0 * NaN would reach the output.
                read = read & (tl.max(seen.to(tl.int32), 0) > 0)
            s = tl.where(seen, s, float("-inf"))
        top = tl.max(s, 1)
        if FOLD_SCALE:
            top = top * scale
        m_new = tl.maximum(m_i, top)
        m_safe = m_new
        if EDGE:
            # A row that has seen nothing yet keeps -inf; 0 stands in for it so that no -inf minus -inf arises.
            m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
        if FOLD_SCALE:
            x = s * scale - m_safe[:, None]
        else:
            x = s - m_safe[:, None]
        p = tl.exp2(x)
        alpha = tl.exp2(m_i - m_safe)
        if STATS:
            if EDGE:
                x = tl.maximum(x, -1.0e4)
            e_i = alpha * (e_i + l_i * tl.where(m_i == float("-inf"), 0.0, m_i - m_safe)) + tl.sum(p * x, 1)
            if CAUSAL:
                d_i = d_i * alpha + tl.sum(p * (cols - (row_start + offset)).to(tl.float32)[None, :], 1)
            else:
                d_i = d_i * alpha + tl.sum(p * tl.abs((rows + offset).to(tl.float32)[:, None] - cols.to(tl.float32)[None, :]), 1)
        l_i = l_i * alpha + tl.sum(p, 1)
        v_0 = load_part(v_block, keys, stride_vn, read, 0, V_0, VALUE_DIM, EDGE)
        p = p.to(v_0.dtype)
        acc_0 = tl.dot(p, v_0, acc_0 * alpha[:, None], input_precision="ieee")
        if V_1 > 0:
            v_1 = load_part(v_block, keys, stride_vn, read, V_0, V_1, VALUE_DIM, EDGE)
            acc_1 = tl.dot(p, v_1, acc_1 * alpha[:, None], input_precision="ieee")
        m_i = m_new
    return m_i, l_i, acc_0, acc_1, e_i, d_i


@triton.jit
def score_of_key(
    q_0, q_1, k_ptr, col, rows, mask_base, bias_base, stride_mn, stride_bm, stride_bn, row_start, q_len, kv_len, window, scale,
    softcap, slope,
    HEAD_DIM: tl.constexpr, D_0: tl.constexpr, D_1: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, BIAS: tl.constexpr, HAS_MASK: tl.constexpr, PRECISE: tl.constexpr,
):  # fmt: skip
    """Base-2 scores [M] of a tile's queries with the one key `col` at k_ptr, -inf where it is hidden."""
    s = tl.sum(q_0.to(tl.float32) * load_vector(k_ptr, col < kv_len, 0, D_0, HEAD_DIM)[None, :], 1)
    if D_1 > 0:
        s += tl.sum(q_1.to(tl.float32) * load_vector(k_ptr, col < kv_len, D_0, D_1, HEAD_DIM)[None, :], 1)
    s = capped(s, scale, softcap, SOFTCAP, PRECISE)
    if ALIBI:
        s = with_alibi(s, rows, col, kv_len - q_len, slope)
    seen = visible_tile(rows, col, q_len, kv_len, window, CAUSAL, WINDOW)
    if HAS_MASK:
        seen = seen & key_mask_row(mask_base, col, stride_mn, kv_len)
    if BIAS > 0:
        s, seen = biased(s, seen, bias_base + (rows - row_start) * stride_bm + tl.cast(col, tl.int64) * stride_bn, BIAS)
    return tl.where(seen, s, float("-inf"))


@triton.jit
def load_vector(pointer, exists, START: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr):
    dims = START + tl.arange(0, WIDTH)
    return tl.load(pointer + dims, mask=exists & (dims < DIM), other=0.0).to(tl.float32)
