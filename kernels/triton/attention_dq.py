"""Gradients of queries, and of a bias tile by tile: one program walks over the keys that its block of queries sees."""

from __future__ import annotations

import triton
import triton.language as tl

from headprune.kernels.recompute import probabilities, saved_lse
from headprune.kernels.scores import dot_parts, key_mask_row, load_part, store_part
from headprune.kernels.spans import key_span, sequence, tile_count, tile_start


@triton.jit(do_not_specialize=["q_len", "kv_len", "window"])
def dq_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dq_ptr, dbias_ptr, kv_of_query_ptr, cu_q_ptr, cu_k_ptr,
    mask_ptr, gate_ptr, bias_ptr, slopes_ptr,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_dob, stride_doh, stride_dom, stride_lb, stride_lh, stride_dqb, stride_dqh, stride_dqm,
    stride_mb, stride_mn, stride_gb, stride_gh, stride_bb, stride_bh, stride_bm, stride_bn,
    q_len, kv_len, scale, softcap, grad_scale, window,
    HEAD_DIM: tl.constexpr, D_0: tl.constexpr, D_1: tl.constexpr, VALUE_DIM: tl.constexpr, E_0: tl.constexpr, E_1: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    PRECISE: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """dQ and the gradient of a bias, where their pointers are given.

    `dbias_ptr`: fp32 [batch, query_heads, q_len, kv_len], zero before; tiles that nobody sees stay so.
    """
    # Neighbours are the heads of one group, for the sake of L2; the last queries see most keys and start first.
    head, sample = tl.program_id(0), tl.program_id(2).to(tl.int64)
    m0 = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_M
    q_start, q_len = sequence(sample, cu_q_ptr, q_len)
    k_start, kv_len = sequence(sample, cu_k_ptr, kv_len)
    if m0 >= q_len:
        return
    head_64 = tl.cast(head, tl.int64)
    kv_head = tl.load(kv_of_query_ptr + head).to(tl.int64)
    start, full_start, full_stop, stop = key_span(m0, q_len, kv_len, window, CAUSAL, WINDOW, BLOCK_M, BLOCK_N)
    gate, slope = 1.0, 0.0
    if gate_ptr is not None:
        gate = tl.load(gate_ptr + sample * stride_gb + head * stride_gh).to(tl.float32)
    if slopes_ptr is not None:
        slope = tl.load(slopes_ptr + head).to(tl.float32)
    local_m = tl.arange(0, BLOCK_M)
    exists = local_m < q_len - m0
    q_base = q_ptr + sample * stride_qb + head_64 * stride_qh + (q_start + m0) * stride_qm
    do_base = do_ptr + sample * stride_dob + head_64 * stride_doh + (q_start + m0) * stride_dom
    stat = sample * stride_lb + head_64 * stride_lh + q_start + m0
    k_base = k_ptr + sample * stride_kb + kv_head * stride_kh + k_start * stride_kn
    v_base = v_ptr + sample * stride_vb + kv_head * stride_vh + k_start * stride_vn
    q_0 = load_part(q_base, local_m, stride_qm, exists, 0, D_0, HEAD_DIM, True)
    do_0 = load_part(do_base, local_m, stride_dom, exists, 0, E_0, VALUE_DIM, True)
    q_1, do_1 = q_0, do_0
    dq_0 = tl.zeros([BLOCK_M, D_0], tl.float32)
    dq_1 = dq_0
    if D_1 > 0:
        q_1 = load_part(q_base, local_m, stride_qm, exists, D_0, D_1, HEAD_DIM, True)
        dq_1 = tl.zeros([BLOCK_M, D_1], tl.float32)
    if E_1 > 0:
        do_1 = load_part(do_base, local_m, stride_dom, exists, E_0, E_1, VALUE_DIM, True)
    lse = saved_lse(lse_ptr + stat + local_m, exists)
    delta = tl.load(delta_ptr + stat + local_m, mask=exists, other=0.0)
    rows = m0 + local_m[:, None]
    local_n = tl.arange(0, BLOCK_N)
    # A mask or a bias makes an edge of every tile.
    MASKED: tl.constexpr = mask_ptr is not None or BIAS > 0
    if MASKED:
        full_start = start // BLOCK_N * BLOCK_N
        full_stop = full_start
    for EDGE in tl.static_range(2):
        if EDGE == 1 or not MASKED:
            tiles = tile_count(start, full_start, full_stop, stop, EDGE, BLOCK_N)
            if gate_ptr is not None:
                tiles = tl.where(gate == 0.0, 0, tiles)
            for index in range(tiles):
                n0 = tile_start(index, start, full_start, full_stop, stop, EDGE, BLOCK_N)
                cols = n0 + local_n[None, :]
                # Hidden keys are read as 0: NaN in one would reach dQ through 0 * NaN.
                shown = (n0 + local_n >= start) & (n0 + local_n < stop)
                if mask_ptr is not None:
                    shown = shown & key_mask_row(mask_ptr + sample * stride_mb, n0 + local_n, stride_mn, kv_len)
                k_tile, v_tile = k_base + tl.cast(n0, tl.int64) * stride_kn, v_base + tl.cast(n0, tl.int64) * stride_vn
                k_0 = load_part(k_tile, local_n, stride_kn, shown, 0, D_0, HEAD_DIM, EDGE)
                k_1 = k_0
                if D_1 > 0:
                    k_1 = load_part(k_tile, local_n, stride_kn, shown, D_0, D_1, HEAD_DIM, EDGE)
                qk = dot_parts(q_0, q_1, k_0, k_1, D_1)
                bias_ptrs = bias_ptr
                if BIAS > 0:
                    bias_ptrs = (
                        bias_ptr + sample * stride_bb + head_64 * stride_bh + rows.to(tl.int64) * stride_bm
                        + cols.to(tl.int64) * stride_bn
                    )  # fmt: skip
                p, seen, steepness = probabilities(
                    qk, lse[:, None], rows, cols, q_len, kv_len, scale, softcap, window, slope, bias_ptrs,
                    EDGE, CAUSAL, WINDOW, SOFTCAP, PRECISE, slopes_ptr is not None, BIAS,
                )  # fmt: skip
                v_0 = load_part(v_tile, local_n, stride_vn, shown, 0, E_0, VALUE_DIM, EDGE)
                v_1 = v_0
                if E_1 > 0:
                    v_1 = load_part(v_tile, local_n, stride_vn, shown, E_0, E_1, VALUE_DIM, EDGE)
                ds = p * (dot_parts(do_0, do_1, v_0, v_1, E_1) * gate - delta[:, None])
                if EDGE:
                    seen = seen & shown[None, :]
                    ds = tl.where(seen, ds, 0.0)
                if dbias_ptr is not None:
                    dbias_row = (sample * tl.num_programs(0) + head_64) * q_len + rows
                    tl.store(dbias_ptr + dbias_row * kv_len + cols, ds, mask=(rows < q_len) & (cols < kv_len))
                if SOFTCAP:
                    ds = ds * steepness
                    if EDGE:
                        # The steepness of a key behind a bias may be NaN.
                        ds = tl.where(seen, ds, 0.0)
                ds = ds.to(k_0.dtype)
                if BIAS > 0:
                    nobody = tl.max(seen.to(tl.int32), axis=0) == 0
                    k_0 = tl.where(nobody[:, None], 0.0, k_0)
                    if D_1 > 0:
                        k_1 = tl.where(nobody[:, None], 0.0, k_1)
                if dq_ptr is not None:
                    dq_0 = tl.dot(ds, k_0, dq_0, input_precision="ieee")
                    if D_1 > 0:
                        dq_1 = tl.dot(ds, k_1, dq_1, input_precision="ieee")
    if dq_ptr is not None:
        dq_base = dq_ptr + sample * stride_dqb + head_64 * stride_dqh + (q_start + m0) * stride_dqm
        store_part(dq_base, dq_0 * grad_scale, local_m, stride_dqm, exists, 0, D_0, HEAD_DIM)
        if D_1 > 0:
            store_part(dq_base, dq_1 * grad_scale, local_m, stride_dqm, exists, D_0, D_1, HEAD_DIM)
