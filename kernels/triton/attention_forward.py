"""Flash attention forward for any number of query heads and ragged groups, in plain Triton.

Names as in the papers: q, k, v, o; m_i and l_i are the running maximum and sum of the online softmax (base 2), lse its natural
logarithm. A program computes BLOCK_M query rows of one head of one sample, in the order of schedule.py. Keys that every row of
the tile sees are taken without any mask; only the blocks on the causal diagonal, at the window's edges and at the end are masked.
head_dim and value_dim are each covered by one or two tiles (scores.split_dim).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from headprune.kernels.aligned import aligned, concerned
from headprune.kernels.head_statistics import empty_partials, statistics_launch, store_empty_tile, store_tile
from headprune.kernels.launch import Launch, as_bytes, capability_of, head_table, near
from headprune.kernels.schedule import section_pairs, tile_of
from headprune.kernels.scores import ADDED_BIAS, BOOL_BIAS, LOG2E, NO_BIAS, load_part, precise_tanh, split_dim, store_part
from headprune.kernels.softmax_blocks import attend_to_keys, score_of_key
from headprune.kernels.tiles import forward_tile

_LN2 = tl.constexpr(0.6931471805599453)
_LOG2E = tl.constexpr(LOG2E)


@triton.jit(do_not_specialize=["heads", "pairs", "blocks", "section", "q_len", "kv_len", "window"])
def attention_forward_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, kv_of_query_ptr, mask_ptr, bias_ptr, slopes_ptr, sinks_ptr, gate_ptr, cu_q_ptr, cu_k_ptr,
    query_mask_ptr, first_ptr, partial_ptr,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn, stride_ob, stride_oh,
    stride_om, stride_lb, stride_lh, stride_mb, stride_mn, stride_bb, stride_bh, stride_bm, stride_bn, stride_gb, stride_gh,
    stride_rb, stride_rm,
    heads, pairs, blocks, section, q_len, kv_len, window, scale, softcap,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, D_0: tl.constexpr, D_1: tl.constexpr, V_0: tl.constexpr, V_1: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    BIAS: tl.constexpr, FOLD_SCALE: tl.constexpr, PRECISE: tl.constexpr,
):  # fmt: skip
    STATS: tl.constexpr = partial_ptr is not None
    ALIBI: tl.constexpr = slopes_ptr is not None
    HAS_MASK: tl.constexpr = mask_ptr is not None
    sample_index, head_index, block = tile_of(tl.program_id(0), heads, pairs, blocks, section)
    sample, head = sample_index.to(tl.int64), head_index.to(tl.int64)
    row_start = block * BLOCK_M
    q_first = tl.cast(0, tl.int64)
    k_first = tl.cast(0, tl.int64)
    if cu_q_ptr is not None:
        q_first = tl.load(cu_q_ptr + sample).to(tl.int64)
        k_first = tl.load(cu_k_ptr + sample).to(tl.int64)
        q_len = tl.load(cu_q_ptr + sample + 1) - q_first.to(tl.int32)
        kv_len = tl.load(cu_k_ptr + sample + 1) - k_first.to(tl.int32)
        if row_start >= q_len:
            return
    queries = tl.arange(0, BLOCK_M)
    rows = row_start + queries
    exists = rows < q_len
    row_base = q_first + row_start
    o_base = o_ptr + sample * stride_ob + head * stride_oh + row_base * stride_om
    lse_ptrs = lse_ptr + sample * stride_lb + head * stride_lh + row_base + queries
    partial = partial_ptr
    plane = pairs.to(tl.int64) * blocks
    if STATS:
        partial = partial_ptr + (sample * heads + head) * blocks + block
    gate = 1.0
    if gate_ptr is not None:
        gate = tl.load(gate_ptr + sample * stride_gb + head * stride_gh).to(tl.float32)
        if gate == 0.0:
            store_part(o_base, tl.zeros([BLOCK_M, V_0], tl.float32), queries, stride_om, exists, 0, V_0, VALUE_DIM)
            if V_1 > 0:
                store_part(o_base, tl.zeros([BLOCK_M, V_1], tl.float32), queries, stride_om, exists, V_0, V_1, VALUE_DIM)
            tl.store(lse_ptrs, tl.full([BLOCK_M], float("-inf"), tl.float32), mask=exists)
            if STATS:
                store_empty_tile(partial, plane)
            return
    kv_head = tl.load(kv_of_query_ptr + head).to(tl.int64)
    q_base = q_ptr + sample * stride_qb + head * stride_qh + row_base * stride_qm
    k_base = k_ptr + sample * stride_kb + kv_head * stride_kh + k_first * stride_kn
    v_base = v_ptr + sample * stride_vb + kv_head * stride_vh + k_first * stride_vn
    mask_base = mask_ptr
    if HAS_MASK:
        mask_base = mask_ptr + sample * stride_mb
    bias_base = bias_ptr
    if BIAS > 0:
        bias_base = bias_ptr + sample * stride_bb + head * stride_bh + row_start.to(tl.int64) * stride_bm
    slope = 0.0
    if ALIBI:
        slope = tl.load(slopes_ptr + head).to(tl.float32)
    q_0 = load_part(q_base, queries, stride_qm, exists, 0, D_0, HEAD_DIM, True)
    q_1 = q_0
    if D_1 > 0:
        q_1 = load_part(q_base, queries, stride_qm, exists, D_0, D_1, HEAD_DIM, True)

    # Keys that some row of the tile may see: low .. high. Keys that all of them see: full_low .. full_high.
    offset = kv_len - q_len
    first, last = row_start + offset, tl.minimum(row_start + BLOCK_M, q_len) - 1 + offset
    low, high = 0, kv_len
    full_low, full_high = 0, kv_len
    if CAUSAL:
        high = tl.minimum(high, last + 1)
        full_high = tl.minimum(full_high, first + 1)
    elif WINDOW:
        high = tl.minimum(high, last + window)
        full_high = tl.minimum(full_high, first + window)
    if WINDOW:
        low = tl.maximum(first - window + 1, 0)
        full_low = tl.cdiv(tl.maximum(last - window + 1, 0), BLOCK_N) * BLOCK_N
    start = low // BLOCK_N * BLOCK_N
    full_high = tl.maximum(full_high, 0) // BLOCK_N * BLOCK_N

    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc_0 = tl.zeros([BLOCK_M, V_0], tl.float32)
    acc_1 = l_i
    if V_1 > 0:
        acc_1 = tl.zeros([BLOCK_M, V_1], tl.float32)
    state = (m_i, l_i, acc_0, acc_1, l_i, l_i)
    # The window's far edge, then the keys that all rows see, then the rest: the diagonal and the end. All of them may be hidden
    # by a mask or a bias.
    MASKED: tl.constexpr = HAS_MASK or BIAS > 0
    FIRST_PHASE: tl.constexpr = 2 if MASKED else (0 if WINDOW else 1)
    for phase in tl.static_range(FIRST_PHASE, 3):
        if phase == 0:
            begin, end = start, tl.minimum(full_low, high)
        elif phase == 1:
            begin, end = full_low, full_high
        elif MASKED:
            begin, end = start, high
        else:
            begin, end = tl.maximum(full_low, full_high), high
        state = attend_to_keys(
            state, begin, end, low, high, q_0, q_1, k_base, v_base, mask_base, bias_base, stride_kn, stride_vn, stride_mn,
            stride_bm, stride_bn, row_start, q_len, kv_len, window, scale, softcap, slope, HEAD_DIM, VALUE_DIM, D_0, D_1, V_0, V_1,
            BLOCK_M, BLOCK_N, CAUSAL, WINDOW, SOFTCAP, ALIBI, BIAS, HAS_MASK, FOLD_SCALE, PRECISE, STATS, phase != 1,
        )  # fmt: skip
    m_i, l_i, acc_0, acc_1, e_i, d_i = state

    top, seen = m_i, l_i
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + head).to(tl.float32) * _LOG2E
        m_i = tl.maximum(top, sink)
    m_safe = tl.where(m_i == float("-inf"), 0.0, m_i)
    alpha = tl.exp2(top - m_safe)
    l_i = seen * alpha
    if sinks_ptr is not None:
        l_i += tl.exp2(sink - m_safe)
    empty = l_i == 0.0
    weight = alpha / tl.where(empty, 1.0, l_i)
    lse = tl.where(empty, float("-inf"), m_i + tl.log2(tl.where(empty, 1.0, l_i)))
    tl.store(lse_ptrs, lse * _LN2, mask=exists)
    factor = (weight * gate)[:, None]
    acc_0 = acc_0 * factor
    store_part(o_base, acc_0, queries, stride_om, exists, 0, V_0, VALUE_DIM)
    if V_1 > 0:
        acc_1 = acc_1 * factor
        store_part(o_base, acc_1, queries, stride_om, exists, V_0, V_1, VALUE_DIM)
    if STATS:
        norm = tl.sum(acc_0 * acc_0, 1)
        if V_1 > 0:
            norm += tl.sum(acc_1 * acc_1, 1)
        # Read again rather than kept in registers through the loop.
        q_0 = load_part(q_base, queries, stride_qm, exists, 0, D_0, HEAD_DIM, True)
        if D_1 > 0:
            q_1 = load_part(q_base, queries, stride_qm, exists, D_0, D_1, HEAD_DIM, True)
        key = 0
        if first_ptr is not None:
            key = tl.load(first_ptr + sample)
        s = score_of_key(
            q_0, q_1, k_base + tl.cast(key, tl.int64) * stride_kn, key, rows, mask_base, bias_base, stride_mn, stride_bm,
            stride_bn, row_start, q_len, kv_len, window, scale, softcap, slope, HEAD_DIM, D_0, D_1, CAUSAL, WINDOW, SOFTCAP, ALIBI,
            BIAS, HAS_MASK, PRECISE,
        )  # fmt: skip
        counted = exists & (top > float("-inf"))
        if query_mask_ptr is not None:
            counted = counted & (tl.load(query_mask_ptr + sample * stride_rb + rows * stride_rm, mask=exists, other=0) != 0)
        if CAUSAL:
            d_i = queries.to(tl.float32) * seen - d_i
        store_tile(
            partial, plane, counted, (lse - top) * seen * weight - e_i * weight, top, tl.exp2(top - lse), tl.exp2(s - lse),
            d_i * weight, tl.sqrt(norm),
        )  # fmt: skip


def attention_forward(
    query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor, stats: Tensor | None, kv_of_query: tuple[int, ...],
    **options,
) -> None:  # fmt: skip
    """Fills output, lse and (where given) stats; the arguments are those of `forward_launches`."""
    (wide_value,) = aligned(value) if concerned(value) else (value,)
    # Zeros: no tile writes the tokens behind the last packed sequence.
    wide = output if wide_value is value else output.new_zeros((*output.shape[:3], wide_value.shape[3]))
    capability = capability_of(query.device)
    for launch in forward_launches(query, key, wide_value, wide, lse, stats, kv_of_query, capability, **options):
        launch.run()
    if wide is not output:
        output.copy_(wide[..., : output.shape[3]])


def forward_launches(
    query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor, stats: Tensor | None, kv_of_query: tuple[int, ...],
    capability: int, *, causal: bool = False, window: int = 0, scale: float = 1.0, softcap: float = 0.0,
    bias: Tensor | None = None, alibi_slopes: Tensor | None = None, sinks: Tensor | None = None, key_mask: Tensor | None = None,
    query_mask: Tensor | None = None, gate: Tensor | None = None, cu_seqlens: tuple[Tensor, Tensor] | None = None,
    longest: tuple[int, int] | None = None,
) -> list[Launch]:  # fmt: skip
    """What computes one forward: the attention kernel and, with `stats`, the sum over its tiles.

    query [batch, query_heads, query_len, head_dim], key and value [batch, kv_heads, kv_len, ...], output as the query with
    value_dim columns; all with last stride 1. lse fp32 [batch, query_heads, query_len], last stride 1; stats fp32 [6, batch,
    query_heads], contiguous. Options as in headprune.ops.attention; window and softcap are 0 where off.
    With cu_seqlens (int32 [sequences + 1] of the queries and of the keys) batch is 1, the tokens of all sequences lie one after
    the other along query_len and kv_len, `longest` holds the longest lengths, and gate and stats count sequences.
    """
    packed = cu_seqlens is not None
    cu_q, cu_k = cu_seqlens or (None, None)
    (batch, heads, q_len, head_dim), (kv_heads, kv_len, value_dim) = query.shape, value.shape[1:]
    if packed:
        batch, (q_len, kv_len) = cu_q.shape[0] - 1, longest
    loaded = stats is not None or key_mask is not None or alibi_slopes is not None or window or softcap
    use = "bias" if bias is not None else "loaded" if loaded else ("full", "causal")[causal]
    tile = forward_tile(capability, query.dtype, max(head_dim, value_dim), use)
    pairs, blocks = batch * heads, triton.cdiv(q_len, tile.block_m)
    partials = None if stats is None else empty_partials(stats, blocks)
    bias = bias if bias is None else bias.expand(batch, heads, q_len, kv_len)
    kind = NO_BIAS if bias is None else BOOL_BIAS if bias.dtype == torch.bool else ADDED_BIAS
    key_mask, query_mask, bias = as_bytes(key_mask), as_bytes(query_mask), as_bytes(bias)
    first = first_valid_key(key_mask) if stats is not None and key_mask is not None else None
    arguments = {
        "q_ptr": query, "k_ptr": key, "v_ptr": value, "o_ptr": output, "lse_ptr": lse,
        "kv_of_query_ptr": head_table(kv_of_query, query.device), "mask_ptr": key_mask, "bias_ptr": bias,
        "slopes_ptr": contiguous(alibi_slopes), "sinks_ptr": contiguous(sinks), "gate_ptr": gate, "cu_q_ptr": contiguous(cu_q),
        "cu_k_ptr": contiguous(cu_k), "query_mask_ptr": query_mask, "first_ptr": first, "partial_ptr": partials,
        **strides("q", "bhm", query, packed), **strides("k", "bhn", key, packed), **strides("v", "bhn", value, packed),
        **strides("o", "bhm", output, packed), **strides("l", "bh", lse, packed), **strides("m", "bn", key_mask),
        **strides("b", "bhmn", bias), **strides("g", "bh", gate), **strides("r", "bm", query_mask),
        "heads": heads, "pairs": pairs, "blocks": blocks,
        "section": section_pairs(pairs, heads / max(kv_heads, 1), kv_len * (head_dim + value_dim) * key.itemsize, query.device),
        "q_len": q_len, "kv_len": kv_len, "window": near(window), "scale": scale * LOG2E, "softcap": softcap * LOG2E,
    }  # fmt: skip
    (d_0, d_1), (v_0, v_1) = split_dim(head_dim), split_dim(value_dim)
    constants = {
        "HEAD_DIM": head_dim, "VALUE_DIM": value_dim, "D_0": d_0, "D_1": d_1, "V_0": v_0, "V_1": v_1, "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n, "CAUSAL": causal, "WINDOW": window > 0, "SOFTCAP": softcap > 0, "BIAS": kind,
        "FOLD_SCALE": scale > 0 and not softcap and alibi_slopes is None and bias is None,
        "PRECISE": precise_tanh(query.dtype, softcap),
    }  # fmt: skip
    launches = [Launch(attention_forward_kernel, (pairs * blocks,), arguments, constants, tile.warps, tile.stages)]
    return launches if stats is None else [*launches, statistics_launch(partials, stats, tile.block_m, arguments["cu_q_ptr"])]


def strides(letter: str, dims: str, tensor: Tensor | None, packed: bool = False) -> dict[str, int]:
    """{"stride_qb": ...} for each of the tensor's dims; 0 without a tensor, in a dimension that it lacks at the front, and over
    the samples of a packed batch, which all count from the same pointer."""
    found = [] if tensor is None else list(tensor.stride()[: len(dims)])
    if packed and found:
        found[0] = 0
    found = [0] * (len(dims) - len(found)) + found
    return {f"stride_{letter}{dim}": stride for dim, stride in zip(dims, found)}


def first_valid_key(key_mask: Tensor) -> Tensor:
    """int32 [batch]: the first key that a mask (uint8 [batch, kv_len]) lets through."""
    return key_mask.argmax(dim=1).int() if key_mask.shape[1] else key_mask.new_zeros(key_mask.shape[0], dtype=torch.int32)


def contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()
