"""Gradients of keys and values: one program walks over every query of the heads that read its block of keys.

It sums over a ragged group in registers, in a fixed order: no atomics, the same bits in every run. Scores stand transposed,
[keys, queries], so that P^T and dS^T are the left operands of dV = P^T dO and dK = dS^T Q straight from registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from headprune.kernels.recompute import probabilities, saved_lse
from headprune.kernels.scores import dot_parts, key_mask_row, load_part, store_part
from headprune.kernels.spans import query_span, sequence, tile_count, tile_start


@triton.jit(do_not_specialize=["q_len", "kv_len", "window"])
def dkdv_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, groups_ptr, cu_q_ptr, cu_k_ptr,
    mask_ptr, gate_ptr, bias_ptr, slopes_ptr,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_dob, stride_doh, stride_dom, stride_lb, stride_lh, stride_dkb, stride_dkh, stride_dkn,
    stride_dvb, stride_dvh, stride_dvn, stride_mb, stride_mn, stride_gb, stride_gh, stride_bb, stride_bh, stride_bm, stride_bn,
    q_len, kv_len, scale, softcap, grad_scale, window,
    HEAD_DIM: tl.constexpr, D_0: tl.constexpr, D_1: tl.constexpr, VALUE_DIM: tl.constexpr, E_0: tl.constexpr, E_1: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    PRECISE: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """dK and dV, where their pointers are given.

    `groups_ptr`, int32: the kv heads, largest group first, then where each kv head's query heads start [kv_heads + 1].
    """
    # The longest programs start first: large groups, and the first keys, which causal queries see most.
    n0, sample = tl.program_id(0) * BLOCK_N, tl.program_id(1).to(tl.int64)
    kv_head = tl.load(groups_ptr + tl.program_id(2)).to(tl.int64)
    first_head = tl.load(groups_ptr + tl.num_programs(2) + kv_head)
    last_head = tl.load(groups_ptr + tl.num_programs(2) + kv_head + 1)
    q_start, q_len = sequence(sample, cu_q_ptr, q_len)
    k_start, kv_len = sequence(sample, cu_k_ptr, kv_len)
    if n0 >= kv_len:
        return
    start, full_start, full_stop, stop = query_span(n0, q_len, kv_len, window, CAUSAL, WINDOW, BLOCK_M, BLOCK_N)
    local_n = tl.arange(0, BLOCK_N)
    inside = local_n < kv_len - n0
    shown = inside
    if mask_ptr is not None:
        # A hidden key touches nothing but its own rows of dK and dV; read as 0 it brings no NaN into them either.
        shown = key_mask_row(mask_ptr + sample * stride_mb, n0 + local_n, stride_mn, kv_len)
        stop = tl.where(tl.max(shown.to(tl.int32), axis=0) > 0, stop, start)
        full_start, full_stop = tl.minimum(full_start, stop), tl.minimum(full_stop, stop)
    k_base = k_ptr + sample * stride_kb + kv_head * stride_kh + (k_start + n0) * stride_kn
    v_base = v_ptr + sample * stride_vb + kv_head * stride_vh + (k_start + n0) * stride_vn
    k_0 = load_part(k_base, local_n, stride_kn, shown, 0, D_0, HEAD_DIM, True)
    v_0 = load_part(v_base, local_n, stride_vn, shown, 0, E_0, VALUE_DIM, True)
    k_1, v_1 = k_0, v_0
    dk_0, dv_0 = tl.zeros([BLOCK_N, D_0], tl.float32), tl.zeros([BLOCK_N, E_0], tl.float32)
    dk_1, dv_1 = dk_0, dv_0
    if D_1 > 0:
        k_1 = load_part(k_base, local_n, stride_kn, shown, D_0, D_1, HEAD_DIM, True)
        dk_1 = tl.zeros([BLOCK_N, D_1], tl.float32)
    if E_1 > 0:
        v_1 = load_part(v_base, local_n, stride_vn, shown, E_0, E_1, VALUE_DIM, True)
        dv_1 = tl.zeros([BLOCK_N, E_1], tl.float32)
    if BIAS > 0:
        full_start = start // BLOCK_M * BLOCK_M
        full_stop = full_start
    cols = n0 + local_n[:, None]
    local_m = tl.arange(0, BLOCK_M)
    for head in range(first_head, last_head):
        head_64 = tl.cast(head, tl.int64)
        q_base = q_ptr + sample * stride_qb + head_64 * stride_qh + q_start * stride_qm
        do_base = do_ptr + sample * stride_dob + head_64 * stride_doh + q_start * stride_dom
        stat = sample * stride_lb + head_64 * stride_lh + q_start
        gate, slope = 1.0, 0.0
        if gate_ptr is not None:
            gate = tl.load(gate_ptr + sample * stride_gb + head * stride_gh).to(tl.float32)
        if slopes_ptr is not None:
            slope = tl.load(slopes_ptr + head).to(tl.float32)
        for EDGE in tl.static_range(2):
            if EDGE == 1 or BIAS == 0:
                tiles = tile_count(start, full_start, full_stop, stop, EDGE, BLOCK_M)
                if gate_ptr is not None:
                    tiles = tl.where(gate == 0.0, 0, tiles)
                for index in range(tiles):
                    m0 = tile_start(index, start, full_start, full_stop, stop, EDGE, BLOCK_M)
                    rows = m0 + local_m
                    exists = rows < q_len
                    q_tile, do_tile = q_base + tl.cast(m0, tl.int64) * stride_qm, do_base + tl.cast(m0, tl.int64) * stride_dom
                    q_0 = load_part(q_tile, local_m, stride_qm, exists, 0, D_0, HEAD_DIM, EDGE)
                    q_1 = q_0
                    if D_1 > 0:
                        q_1 = load_part(q_tile, local_m, stride_qm, exists, D_0, D_1, HEAD_DIM, EDGE)
                    qk = dot_parts(k_0, k_1, q_0, q_1, D_1)
                    bias_ptrs = bias_ptr
                    if BIAS > 0:
                        bias_ptrs = (
                            bias_ptr + sample * stride_bb + head_64 * stride_bh + rows[None, :].to(tl.int64) * stride_bm
                            + cols.to(tl.int64) * stride_bn
                        )  # fmt: skip
                    p, seen, steepness = probabilities(
                        qk, saved_lse(lse_ptr + stat + rows, exists)[None, :], rows[None, :], cols, q_len, kv_len, scale, softcap,
                        window, slope, bias_ptrs, EDGE, CAUSAL, WINDOW, SOFTCAP, PRECISE, slopes_ptr is not None, BIAS,
                    )  # fmt: skip
                    do_0 = load_part(do_tile, local_m, stride_dom, exists, 0, E_0, VALUE_DIM, EDGE)
                    do_1 = do_0
                    if E_1 > 0:
                        do_1 = load_part(do_tile, local_m, stride_dom, exists, E_0, E_1, VALUE_DIM, EDGE)
                    if dv_ptr is not None:
                        gated = (p * gate).to(do_0.dtype)
                        dv_0 = tl.dot(gated, do_0, dv_0, input_precision="ieee")
                        if E_1 > 0:
                            dv_1 = tl.dot(gated, do_1, dv_1, input_precision="ieee")
                    if dk_ptr is not None:
                        delta = tl.load(delta_ptr + stat + rows, mask=exists, other=0.0)
                        ds = p * (dot_parts(v_0, v_1, do_0, do_1, E_1) * gate - delta[None, :])
                        if SOFTCAP:
                            ds = ds * steepness
                        if EDGE:
                            ds = tl.where(seen, ds, 0.0)
                        ds = ds.to(q_0.dtype)
                        dk_0 = tl.dot(ds, q_0, dk_0, input_precision="ieee")
                        if D_1 > 0:
                            dk_1 = tl.dot(ds, q_1, dk_1, input_precision="ieee")
    if mask_ptr is not None:
        dk_0, dk_1 = tl.where(shown[:, None], dk_0, 0.0), tl.where(shown[:, None], dk_1, 0.0)
        dv_0, dv_1 = tl.where(shown[:, None], dv_0, 0.0), tl.where(shown[:, None], dv_1, 0.0)
    if dk_ptr is not None:
        dk_base = dk_ptr + sample * stride_dkb + kv_head * stride_dkh + (k_start + n0) * stride_dkn
        store_part(dk_base, dk_0 * grad_scale, local_n, stride_dkn, inside, 0, D_0, HEAD_DIM)
        if D_1 > 0:
            store_part(dk_base, dk_1 * grad_scale, local_n, stride_dkn, inside, D_0, D_1, HEAD_DIM)
    if dv_ptr is not None:
        dv_base = dv_ptr + sample * stride_dvb + kv_head * stride_dvh + (k_start + n0) * stride_dvn
        store_part(dv_base, dv_0, local_n, stride_dvn, inside, 0, E_0, VALUE_DIM)
        if E_1 > 0:
            store_part(dv_base, dv_1, local_n, stride_dvn, inside, E_0, E_1, VALUE_DIM)
