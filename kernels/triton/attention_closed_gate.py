"""The gradients of gates at (or too near) 0: the forward saved no output that they could be had from.

The forward pass again, of exactly those heads; it ends in <O_i, dO'_i> instead of a store. Every other head's programs leave at
once, so that nothing on the host depends on which gates are closed.
"""

from __future__ import annotations

import triton
import triton.language as tl

from headprune.kernels.scores import LOG2E, load_part
from headprune.kernels.softmax_blocks import attend_to_keys
from headprune.kernels.spans import key_span, sequence

_LOG2E = tl.constexpr(LOG2E)


# Of each head. To start one for every block of rows, only to see that no gate is closed, would take longer (predicted, 4096
# programs on an H200: 25 us) than the gates' gradients may (2 % of a backward pass).
PROGRAMS = 8


@triton.jit(do_not_specialize=["blocks", "q_len", "kv_len", "window"])
def closed_gate_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, dgate_ptr, kv_of_query_ptr, cu_q_ptr, cu_k_ptr,
    mask_ptr, gate_ptr, bias_ptr, slopes_ptr, sinks_ptr,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_dob, stride_doh, stride_dom, stride_mb, stride_mn, stride_gb, stride_gh, stride_bb, stride_bh, stride_bm, stride_bn,
    blocks, q_len, kv_len, scale, softcap, window, tiny,
    HEAD_DIM: tl.constexpr, D_0: tl.constexpr, D_1: tl.constexpr, VALUE_DIM: tl.constexpr, E_0: tl.constexpr, E_1: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    PRECISE: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """Where |gate| < tiny: partial sums of dgate, fp32 [samples, heads, row blocks], as `delta_kernel` writes the others."""
    head, sample = tl.program_id(0), tl.program_id(2).to(tl.int64)
    gate = tl.load(gate_ptr + sample * stride_gb + head * stride_gh).to(tl.float32)
    if tl.abs(gate) >= tiny:
        return
    head_64 = head.to(tl.int64)
    kv_head = tl.load(kv_of_query_ptr + head).to(tl.int64)
    q_start, q_len = sequence(sample, cu_q_ptr, q_len)
    k_start, kv_len = sequence(sample, cu_k_ptr, kv_len)
    local_m = tl.arange(0, BLOCK_M)
    k_base = k_ptr + sample * stride_kb + kv_head * stride_kh + k_start * stride_kn
    v_base = v_ptr + sample * stride_vb + kv_head * stride_vh + k_start * stride_vn
    mask_base, bias_base, slope = mask_ptr, bias_ptr, 0.0
    if mask_ptr is not None:
        mask_base = mask_ptr + sample * stride_mb
    if slopes_ptr is not None:
        slope = tl.load(slopes_ptr + head).to(tl.float32)
    for block in tl.range(tl.program_id(1), blocks, tl.num_programs(1)):
        m0 = block * BLOCK_M
        exists = local_m < q_len - m0
        start, _, _, stop = key_span(m0, q_len, kv_len, window, CAUSAL, WINDOW, BLOCK_M, BLOCK_N)
        # A block behind the end of a packed sequence.
        stop = tl.where(m0 < q_len, stop, start)
        q_base = q_ptr + sample * stride_qb + head_64 * stride_qh + (q_start + m0) * stride_qm
        do_base = do_ptr + sample * stride_dob + head_64 * stride_doh + (q_start + m0) * stride_dom
        if BIAS > 0:
            bias_base = bias_ptr + sample * stride_bb + head_64 * stride_bh + m0.to(tl.int64) * stride_bm
        q_0 = load_part(q_base, local_m, stride_qm, exists, 0, D_0, HEAD_DIM, True)
        q_1 = q_0
        if D_1 > 0:
            q_1 = load_part(q_base, local_m, stride_qm, exists, D_0, D_1, HEAD_DIM, True)
        l_i = tl.zeros([BLOCK_M], tl.float32)
        acc_1 = l_i
        if E_1 > 0:
            acc_1 = tl.zeros([BLOCK_M, E_1], tl.float32)
        state = (tl.full([BLOCK_M], float("-inf"), tl.float32), l_i, tl.zeros([BLOCK_M, E_0], tl.float32), acc_1, l_i, l_i)
        # Closed gates are few: all their tiles go through the one masked loop.
        state = attend_to_keys(
            state, start // BLOCK_N * BLOCK_N, stop, start, stop, q_0, q_1, k_base, v_base, mask_base, bias_base, stride_kn,
            stride_vn, stride_mn, stride_bm, stride_bn, m0, q_len, kv_len, window, scale, softcap, slope, HEAD_DIM, VALUE_DIM,
            D_0, D_1, E_0, E_1, BLOCK_M, BLOCK_N, CAUSAL, WINDOW, SOFTCAP, slopes_ptr is not None, BIAS, mask_ptr is not None,
            False, PRECISE, False, True,
        )  # fmt: skip
        m_i, l_i, acc_0, acc_1, _, _ = state
        if sinks_ptr is not None:
            sink = tl.load(sinks_ptr + head).to(tl.float32) * _LOG2E
            l_i += tl.where(m_i == float("-inf"), 0.0, tl.exp2(sink - m_i))
        do_0 = load_part(do_base, local_m, stride_dom, exists, 0, E_0, VALUE_DIM, True)
        total = tl.sum(acc_0 * do_0.to(tl.float32), axis=1)
        if E_1 > 0:
            do_1 = load_part(do_base, local_m, stride_dom, exists, E_0, E_1, VALUE_DIM, True)
            total += tl.sum(acc_1 * do_1.to(tl.float32), axis=1)
        total = tl.where(l_i == 0.0, 0.0, total / tl.where(l_i == 0.0, 1.0, l_i))
        partial = (sample * tl.num_programs(0) + head) * blocks + block
        # Summed as a tile: on sm_100 Triton 3.7 fails on the sum of a vector that came from tensor memory.
        tl.store(dgate_ptr + partial + tl.arange(0, 1), tl.sum(total[:, None], axis=0))
