"""The first pass of the backward: delta, and from its sums the gradients of the gates and sinks.

With O' = g O the gated output that the forward saved, delta_i = <O'_i, dO'_i> = sum_j P_ij dP_ij is what the softmax's
gradient needs (Dao et al. 2022), and its sums over the rows give dL/dg = sum_i delta_i / g and
dL/dsink = -sum_i exp(sink - lse_i) delta_i. Each program writes its own partial sum; torch adds them: no atomics, the same
bits in every run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from headprune.kernels.spans import sequence


@triton.jit(do_not_specialize=["q_len"])
def delta_kernel(
    o_ptr, do_ptr, lse_ptr, gate_ptr, sinks_ptr, cu_q_ptr, delta_ptr, dgate_ptr, dsinks_ptr,
    stride_ob, stride_oh, stride_om, stride_dob, stride_doh, stride_dom, stride_lb, stride_lh, stride_gb, stride_gh,
    q_len, tiny,
    VALUE_DIM: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M rows of one head of one sample; writes what it has a pointer for.

    delta as lse; dgate, dsinks: partial sums, fp32 [samples, heads, row blocks].

    Where |gate| < tiny, O cannot be had from O': `closed_gate_kernel` writes those heads' partial sums.
    """
    head, block, sample = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    head_64 = tl.cast(head, tl.int64)
    q_start, q_len = sequence(sample, cu_q_ptr, q_len)
    gate = tl.full([], 1.0, tl.float32)
    if gate_ptr is not None:
        gate = tl.load(gate_ptr + sample * stride_gb + head * stride_gh).to(tl.float32)
        # The output of a head gated to 0 is 0, and nobody reads its delta.
        q_len = tl.where(gate == 0.0, 0, q_len)
    m0 = block * BLOCK_M
    local = tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_E)
    inside = local < q_len - m0
    tile = inside[:, None] & (dims[None, :] < VALUE_DIM)
    o_base = o_ptr + sample * stride_ob + head_64 * stride_oh + (q_start + m0) * stride_om
    do_base = do_ptr + sample * stride_dob + head_64 * stride_doh + (q_start + m0) * stride_dom
    o = tl.load(o_base + local[:, None] * stride_om + dims[None, :], mask=tile, other=0.0).to(tl.float32)
    do = tl.load(do_base + local[:, None] * stride_dom + dims[None, :], mask=tile, other=0.0).to(tl.float32)
    delta = tl.sum(o * do, axis=1)
    stat = sample * stride_lb + head_64 * stride_lh + q_start + m0 + local
    partial = (sample * tl.num_programs(0) + head) * tl.num_programs(1) + block
    if delta_ptr is not None:
        tl.store(delta_ptr + stat, delta, mask=inside)
    if dgate_ptr is not None:
        tl.store(dgate_ptr + partial, tl.sum(delta, axis=0) / gate, mask=tl.abs(gate) >= tiny)
    if dsinks_ptr is not None:
        lse = tl.load(lse_ptr + stat, mask=inside, other=float("inf"))
        sink = tl.load(sinks_ptr + head).to(tl.float32)
        share = tl.where(lse == float("-inf"), 0.0, tl.exp(sink - lse))
        tl.store(dsinks_ptr + partial, -tl.sum(share * delta, axis=0))
