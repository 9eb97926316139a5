"""Flash attention forward for any number of query heads and ragged groups, in plain Triton.

Names as in the papers: q, k, v, o; m_i and l_i are the running maximum and sum of the online softmax (base 2), lse its
natural logarithm. One program computes BLOCK_M query rows of one head of one sample; neighbouring programs take the heads of
one group, so that they share keys and values in L2.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

import triton
import triton.language as tl

LOG2E = math.log2(math.e)


@triton.jit
def attention_forward_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, kv_of_query_ptr, mask_ptr, gate_ptr,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_ob, stride_oh, stride_om, stride_mb, stride_gb,
    heads, q_len, kv_len, scale,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, HAS_GATE: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    # Causal: the longest rows first.
    block = tl.num_programs(1) - 1 - tl.program_id(1)
    sample = tl.program_id(2).to(tl.int64)
    kv_head = tl.load(kv_of_query_ptr + head)
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    value_dims = tl.arange(0, BLOCK_DV)
    o_ptrs = o_ptr + sample * stride_ob + head * stride_oh + rows[:, None] * stride_om + value_dims[None, :]
    o_mask = (rows[:, None] < q_len) & (value_dims[None, :] < VALUE_DIM)
    lse_ptrs = lse_ptr + (sample * heads + head) * q_len + rows
    gate = 1.0
    if HAS_GATE:
        gate = tl.load(gate_ptr + sample * stride_gb + head).to(tl.float32)
    q = tl.load(
        q_ptr + sample * stride_qb + head * stride_qh + rows[:, None] * stride_qm + dims[None, :],
        mask=(rows[:, None] < q_len) & (dims[None, :] < HEAD_DIM), other=0.0,
    )  # fmt: skip
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    offset = kv_len - q_len
    stop = kv_len
    if CAUSAL:
        stop = tl.minimum(kv_len, (block + 1) * BLOCK_M + offset)
    for start in range(0, stop, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        k = tl.load(
            k_ptr + sample * stride_kb + kv_head * stride_kh + cols[None, :] * stride_kn + dims[:, None],
            mask=(cols[None, :] < kv_len) & (dims[:, None] < HEAD_DIM), other=0.0,
        )  # fmt: skip
        seen = cols < kv_len
        if HAS_MASK:
            seen = seen & (tl.load(mask_ptr + sample * stride_mb + cols, mask=cols < kv_len, other=0) != 0)
        visible = (rows[:, None] < q_len) & seen[None, :]
        if CAUSAL:
            visible = visible & (cols[None, :] <= rows[:, None] + offset)
        s = tl.where(visible, tl.dot(q, k, input_precision="ieee") * scale, float("-inf"))
        m_new = tl.maximum(m_i, tl.max(s, 1))
        # A row that has seen nothing yet keeps -inf; 0 stands in for it so that no -inf minus -inf arises.
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = tl.exp2(s - m_safe[:, None])
        alpha = tl.exp2(m_i - m_safe)
        l_i = l_i * alpha + tl.sum(p, 1)
        v = tl.load(
            v_ptr + sample * stride_vb + kv_head * stride_vh + cols[:, None] * stride_vn + value_dims[None, :],
            mask=seen[:, None] & (value_dims[None, :] < VALUE_DIM), other=0.0,
        )  # fmt: skip
        acc = acc * alpha[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        m_i = m_new
    empty = l_i == 0.0
    o = acc / tl.where(empty, 1.0, l_i)[:, None]
    if HAS_GATE:
        o = o * gate
    tl.store(o_ptrs, o.to(o_ptr.dtype.element_ty), mask=o_mask)
    lse = tl.where(empty, float("-inf"), (m_i + tl.log2(tl.where(empty, 1.0, l_i))) * 0.6931471805599453)
    tl.store(lse_ptrs, lse, mask=rows < q_len)


def attention_forward(
    query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor, kv_of_query: tuple[int, ...],
    *, causal: bool, scale: float, key_mask: Tensor | None, gate: Tensor | None,
) -> None:  # fmt: skip
    """Fills output [batch, query_heads, query_len, value_dim] and lse fp32 [batch, query_heads, query_len].

    query [batch, query_heads, query_len, head_dim], key, value [batch, kv_heads, kv_len, ...]; the last stride is 1.
    """
    batch, heads, q_len, head_dim = query.shape
    kv_len, value_dim = key.shape[2], value.shape[3]
    block_m, block_n, warps, stages = tiles(query.dtype, max(head_dim, value_dim))
    grid = (heads, triton.cdiv(q_len, block_m), batch)
    attention_forward_kernel[grid](
        query, key, value, output, lse, head_table(kv_of_query, query.device), query if key_mask is None else key_mask,
        query if gate is None else gate,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *output.stride()[:3],
        0 if key_mask is None else key_mask.stride(0), gate.stride(0) if gate is not None and gate.dim() == 2 else 0,
        heads, q_len, kv_len, scale * LOG2E,
        HEAD_DIM=head_dim, VALUE_DIM=value_dim, BLOCK_D=padded(head_dim), BLOCK_DV=padded(value_dim),
        BLOCK_M=block_m, BLOCK_N=block_n, CAUSAL=causal, HAS_MASK=key_mask is not None, HAS_GATE=gate is not None,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip


def padded(dim: int) -> int:
    return max(16, triton.next_power_of_2(dim))


def tiles(dtype: torch.dtype, dim: int) -> tuple[int, int, int, int]:
    """(BLOCK_M, BLOCK_N, warps, stages)."""
    if dtype == torch.float32:
        return (32, 16, 4, 2) if dim <= 64 else (16, 16, 4, 1)
    return (128, 64, 8, 3) if dim <= 128 else (64, 32, 8, 2)


@lru_cache(maxsize=512)
def head_table(kv_of_query: tuple[int, ...], device: torch.device) -> Tensor:
    """The head map on the device, int32 [query_heads]."""
    return torch.tensor(kv_of_query, dtype=torch.int32, device=device)
