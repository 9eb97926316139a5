"""Decode attention in Triton: a few new tokens against a cache, for ragged groups.

Names as in the papers: q, k, v, o; m_i and l_i are the running maximum and sum of the online softmax (base 2), lse its
logarithm. One program takes one tile of rows (all query heads of a group x new tokens, see `decode_plan.py`) of one sample
against one split of its keys, so that a key is read once for the whole group. With more than one split it leaves a partial
result, which a second kernel merges in a fixed order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from headprune.kernels.decode_plan import LEAST_KEYS, most_rows, multiprocessors, split_count, tile_table
from headprune.kernels.launch import AotVariant, Launch, as_bytes, capability_of, near
from headprune.kernels.scores import LN2, LOG2E, capped, with_alibi
from headprune.kernels.tiles import family

_LOG2E = tl.constexpr(LOG2E)
_LN2 = tl.constexpr(LN2)


@triton.jit
def key_range(lengths_ptr, sample, capacity, window, NEW: tl.constexpr, HAS_LENGTHS: tl.constexpr, WINDOW: tl.constexpr):
    """(length, first key that any query sees, key behind the last one) of a sample."""
    length = capacity
    if HAS_LENGTHS:
        length = tl.load(lengths_ptr + sample)
    first = 0
    if WINDOW:
        first = tl.maximum(length - NEW - window + 1, 0)
    return length, first, tl.minimum(length, capacity)


@triton.jit
def split_blocks(first, stop, splits, BLOCK_N: tl.constexpr, LEAST: tl.constexpr):
    """(first block, blocks of a split, splits with anything to do, at least 1) of a sample's keys first .. stop."""
    first_block = first // BLOCK_N
    blocks = tl.maximum(tl.cdiv(stop, BLOCK_N) - first_block, 0)
    each = tl.maximum(tl.cdiv(blocks, splits), LEAST // BLOCK_N)
    return first_block, each, tl.maximum(tl.cdiv(blocks, each), 1)


@triton.jit
def with_sink(o_scale, lse, sink):
    """(factor on the output, lse) with one more logit, base 2, in the softmax; a row without keys gets the factor 0."""
    top = tl.maximum(lse, sink)
    top = tl.where(top == float("-inf"), 0.0, top)
    total = top + tl.log2(tl.exp2(lse - top) + tl.exp2(sink - top))
    factor = tl.where(lse == float("-inf"), 0.0, tl.exp2(lse - tl.where(total == float("-inf"), 0.0, total)))
    return o_scale * factor, total


# A growing cache must not compile anew.
_PLAIN = ["tiles", "rows", "capacity", "splits", "window"]


@triton.jit(do_not_specialize=_PLAIN)
def attention_decode_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, part_o_ptr, part_lse_ptr, lengths_ptr, pages_ptr, tiles_ptr, slopes_ptr, sinks_ptr,
    mask_ptr, gate_ptr,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_ob, stride_oh, stride_om, stride_pb, stride_mb, stride_gb,
    tiles, rows, capacity, splits, window, scale, softcap,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, LEAST: tl.constexpr, NEW: tl.constexpr, PAGE_SIZE: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    SPLIT: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, HAS_ALIBI: tl.constexpr, HAS_SINKS: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_GATE: tl.constexpr,
):  # fmt: skip
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    tile_ptr = tiles_ptr + (tl.program_id(0) % tiles) * 3
    split = tl.program_id(1)
    length, first, stop = key_range(lengths_ptr, sample, capacity, window, NEW, HAS_LENGTHS, WINDOW)
    first_block, each, active = split_blocks(first, stop, splits, BLOCK_N, LEAST)
    if split >= active:
        return
    kv_head = tl.load(tile_ptr).to(tl.int64)
    row = tl.load(tile_ptr + 1) + tl.arange(0, BLOCK_M)
    row_mask = row < tl.load(tile_ptr + 2)
    head = row // NEW
    token = row % NEW
    far_head = head.to(tl.int64)
    dims = tl.arange(0, BLOCK_D)
    value_dims = tl.arange(0, BLOCK_DV)
    o_ptrs = o_ptr + sample * stride_ob + (far_head * stride_oh + token * stride_om)[:, None] + value_dims[None, :]
    o_mask = row_mask[:, None] & (value_dims[None, :] < VALUE_DIM)
    gate = tl.full([BLOCK_M], 1.0, tl.float32)
    if HAS_GATE:
        gate = tl.load(gate_ptr + sample * stride_gb + head, mask=row_mask, other=0.0).to(tl.float32)
        if tl.max(tl.abs(gate), 0) == 0.0:
            # Whoever merges sees the same gates and reads no partial result of theirs.
            if not SPLIT:
                tl.store(o_ptrs, tl.zeros([BLOCK_M, BLOCK_DV], o_ptr.dtype.element_ty), mask=o_mask)
                tl.store(lse_ptr + sample * rows + row, tl.full([BLOCK_M], float("-inf"), tl.float32), mask=row_mask)
            return
    q = tl.load(
        q_ptr + sample * stride_qb + (far_head * stride_qh + token * stride_qm)[:, None] + dims[None, :],
        mask=row_mask[:, None] & (dims[None, :] < HEAD_DIM), other=0.0,
    )  # fmt: skip
    slope = tl.zeros([BLOCK_M], tl.float32)
    if HAS_ALIBI:
        slope = tl.load(slopes_ptr + head, mask=row_mask, other=0.0).to(tl.float32)
    k_base = k_ptr + kv_head * stride_kh
    v_base = v_ptr + kv_head * stride_vh
    if PAGE_SIZE == 0:
        k_base += sample * stride_kb
        v_base += sample * stride_vb
    block_cols = tl.arange(0, BLOCK_N)
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    lo = (first_block + split * each) * BLOCK_N
    hi = tl.minimum(lo + each * BLOCK_N, stop)
    for start in range(lo, hi, BLOCK_N):
        cols = start + block_cols
        seen = cols < stop
        if WINDOW:
            seen = seen & (cols >= first)
        if HAS_MASK:
            seen = seen & (tl.load(mask_ptr + sample * stride_mb + cols, mask=seen, other=0) != 0)
        # 64-bit offsets lead to a block, 32-bit ones to a key inside it; small pages need a 64-bit one for each key.
        if PAGE_SIZE == 0:
            k_ptrs = k_base + tl.cast(start, tl.int64) * stride_kn + block_cols * stride_kn
            v_ptrs = v_base + tl.cast(start, tl.int64) * stride_vn + block_cols * stride_vn
        elif PAGE_SIZE % BLOCK_N == 0:
            page = tl.load(pages_ptr + sample * stride_pb + start // PAGE_SIZE).to(tl.int64)
            inside = tl.cast(start % PAGE_SIZE, tl.int64)
            k_ptrs = k_base + (page * stride_kb + inside * stride_kn) + block_cols * stride_kn
            v_ptrs = v_base + (page * stride_vb + inside * stride_vn) + block_cols * stride_vn
        else:
            page = tl.load(pages_ptr + sample * stride_pb + cols // PAGE_SIZE, mask=seen, other=0).to(tl.int64)
            inside = (cols % PAGE_SIZE).to(tl.int64)
            k_ptrs = k_base + (page * stride_kb + inside * stride_kn)
            v_ptrs = v_base + (page * stride_vb + inside * stride_vn)
        k = tl.load(k_ptrs[None, :] + dims[:, None], mask=seen[None, :] & (dims[:, None] < HEAD_DIM), other=0.0)
        s = capped(tl.dot(q, k, input_precision="ieee"), scale, softcap, SOFTCAP, True)
        if HAS_ALIBI:
            s = with_alibi(s, token[:, None], cols[None, :], length - NEW, slope[:, None])
        visible = seen[None, :]
        if NEW > 1:
            ahead = cols[None, :] - (token[:, None] + (length - NEW))
            visible = visible & (ahead <= 0)
            if WINDOW:
                visible = visible & (ahead > -window)
        s = tl.where(visible, s, float("-inf"))
        m_new = tl.maximum(m_i, tl.max(s, 1))
        # A row that has seen nothing yet keeps -inf; 0 stands in for it so that no -inf minus -inf arises.
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = tl.exp2(s - m_safe[:, None])
        alpha = tl.exp2(m_i - m_safe)
        l_i = l_i * alpha + tl.sum(p, 1)
        v = tl.load(v_ptrs[:, None] + value_dims[None, :], mask=seen[:, None] & (value_dims[None, :] < VALUE_DIM), other=0.0)
        acc = acc * alpha[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        m_i = m_new
    empty = l_i == 0.0
    factor = 1.0 / tl.where(empty, 1.0, l_i)
    lse = tl.where(empty, float("-inf"), m_i + tl.log2(tl.where(empty, 1.0, l_i)))
    if SPLIT:
        part = (sample * rows + row) * splits + split
        tl.store(part_lse_ptr + part, lse, mask=row_mask)
        tl.store(part_o_ptr + part[:, None] * VALUE_DIM + value_dims[None, :], acc * factor[:, None], mask=o_mask)
    else:
        if HAS_SINKS:
            sink = tl.load(sinks_ptr + head, mask=row_mask, other=0.0).to(tl.float32) * _LOG2E
            factor, lse = with_sink(factor, lse, sink)
        o = tl.where((gate == 0.0)[:, None], 0.0, acc * (factor * gate)[:, None])
        tl.store(o_ptrs, o.to(o_ptr.dtype.element_ty), mask=o_mask)
        tl.store(lse_ptr + sample * rows + row, tl.where(gate == 0.0, float("-inf"), lse * _LN2), mask=row_mask)


@triton.jit(do_not_specialize=_PLAIN)
def merge_splits_kernel(
    part_o_ptr, part_lse_ptr, o_ptr, lse_ptr, lengths_ptr, sinks_ptr, gate_ptr, stride_ob, stride_oh, stride_om, stride_gb,
    rows, capacity, splits, window,
    VALUE_DIM: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, LEAST: tl.constexpr,
    NEW: tl.constexpr, HAS_LENGTHS: tl.constexpr, WINDOW: tl.constexpr, HAS_SINKS: tl.constexpr, HAS_GATE: tl.constexpr,
):  # fmt: skip
    """One row of one sample: its partial results, in the order of the splits."""
    sample = (tl.program_id(0) // rows).to(tl.int64)
    row = tl.program_id(0) % rows
    head = row // NEW
    dims = tl.arange(0, BLOCK_DV)
    o_ptrs = o_ptr + sample * stride_ob + head * stride_oh + (row % NEW) * stride_om + dims
    gate = 1.0
    if HAS_GATE:
        gate = tl.load(gate_ptr + sample * stride_gb + head).to(tl.float32)
        if gate == 0.0:
            tl.store(o_ptrs, tl.zeros([BLOCK_DV], o_ptr.dtype.element_ty), mask=dims < VALUE_DIM)
            tl.store(lse_ptr + sample * rows + row, float("-inf"))
            return
    _, first, stop = key_range(lengths_ptr, sample, capacity, window, NEW, HAS_LENGTHS, WINDOW)
    _, _, active = split_blocks(first, stop, splits, BLOCK_N, LEAST)
    m_i = float("-inf")
    l_i = 0.0
    acc = tl.zeros([BLOCK_DV], tl.float32)
    for start in range(0, active, BLOCK_S):
        split = start + tl.arange(0, BLOCK_S)
        part = (sample * rows + row) * splits + split
        lse = tl.load(part_lse_ptr + part, mask=split < active, other=float("-inf"))
        o = tl.load(
            part_o_ptr + part[:, None] * VALUE_DIM + dims[None, :],
            mask=(split < active)[:, None] & (dims < VALUE_DIM)[None, :], other=0.0,
        )  # fmt: skip
        m_new = tl.maximum(m_i, tl.max(lse, 0))
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
        weight = tl.exp2(lse - m_safe)
        alpha = tl.exp2(m_i - m_safe)
        l_i = l_i * alpha + tl.sum(weight, 0)
        acc = acc * alpha + tl.sum(weight[:, None] * o, 0)
        m_i = m_new
    empty = l_i == 0.0
    factor = 1.0 / tl.where(empty, 1.0, l_i)
    lse = tl.where(empty, float("-inf"), m_i + tl.log2(tl.where(empty, 1.0, l_i)))
    if HAS_SINKS:
        factor, lse = with_sink(factor, lse, tl.load(sinks_ptr + head).to(tl.float32) * _LOG2E)
    tl.store(o_ptrs, (acc * (factor * gate)).to(o_ptr.dtype.element_ty), mask=dims < VALUE_DIM)
    tl.store(lse_ptr + sample * rows + row, lse * _LN2)


PROGRAMS = 3  # that one multiprocessor of Hopper has the shared memory for (head_dim 128, 16-bit types)


@dataclass(frozen=True)
class Tiles:
    """How a shape is computed: rows and keys of a tile, warps, pipeline stages."""

    block_m: int
    block_n: int
    warps: int
    stages: int


def tiles_for(dtype: torch.dtype, dim: int, rows: int, paged: bool, capability: int) -> Tiles:
    """`dim` is the larger of head_dim and value_dim, `rows` those of the largest group. Not measured on a GPU yet."""
    wide = dtype == torch.float32
    # Consumer cards have 99 KB of shared memory; 64 rows of 256 columns take 100.
    little = capability not in (0, 80) and family(capability) == 80
    block_m = max(16, min(triton.next_power_of_2(rows), 16 if wide else 32 if little and dim > 128 else 64))
    block_n = (64 if dim <= 32 else 32 if dim <= 64 else 16) if wide else (128 if dim <= 64 else 64 if dim <= 128 else 32)
    # Triton fetches the page numbers ahead, in stages of their own.
    return Tiles(block_m, block_n, 4, (2 if wide else 3) + 2 * paged)


def attention_decode(*tensors, **options) -> None:
    """Fills output and lse: see `launches`."""
    for launch in launches(*tensors, **options):
        launch.run()


def launches(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, output: Tensor, lse: Tensor, group_offsets: tuple[int, ...],
    *, lengths: Tensor | None = None, page_table: Tensor | None = None, window: int = 0, scale: float, softcap: float = 0.0,
    alibi_slopes: Tensor | None = None, sinks: Tensor | None = None, key_mask: Tensor | None = None, gate: Tensor | None = None,
    splits: int | None = None, capability: int | None = None,
) -> list[Launch]:  # fmt: skip
    """What fills output [batch, query_heads, new, value_dim] and lse fp32 [batch, query_heads, new], contiguous.

    As in `headprune.ops.attention_decode`; the last strides are 1, those of the options too. Without `lengths` every key of
    the cache counts. `splits`: at most so many for the keys of a sample; by default as many as fill the GPU. lse is -inf for
    heads gated to 0.
    """
    batch, heads, new, head_dim = query.shape
    value_dim, page_size = value_cache.shape[3], key_cache.shape[2]
    capacity = page_size if page_table is None else page_size * page_table.shape[1]
    capability = capability_of(query.device) if capability is None else capability
    sizes = tiles_for(
        query.dtype, max(head_dim, value_dim), most_rows(group_offsets, new), page_table is not None, capability
    )  # fmt: skip
    table = tile_table(group_offsets, new, sizes.block_m, query.device)
    programs, rows = batch * table.shape[0], heads * new
    if splits is None:
        splits = split_count(programs, capacity, PROGRAMS * multiprocessors(query.device))
    # One allocation for both partial results.
    parts = query.new_empty((batch * rows * splits * (value_dim + 1) if splits > 1 else 1,), dtype=torch.float32)
    unused = query  # a pointer that is never read
    shared = {
        "o_ptr": output, "lse_ptr": lse, "part_o_ptr": parts,
        "part_lse_ptr": parts[batch * rows * splits * value_dim :] if splits > 1 else parts,
        "lengths_ptr": unused if lengths is None else lengths, "sinks_ptr": unused if sinks is None else sinks,
        "gate_ptr": unused if gate is None else gate, **strides("o", output),
        "stride_gb": gate.stride(0) if gate is not None and gate.dim() == 2 else 0,
        "rows": rows, "capacity": capacity, "splits": splits, "window": near(window),
    }  # fmt: skip
    constants = {
        "VALUE_DIM": value_dim, "BLOCK_DV": padded(value_dim), "BLOCK_N": sizes.block_n, "LEAST": LEAST_KEYS, "NEW": new,
        "HAS_LENGTHS": lengths is not None, "WINDOW": window > 0, "HAS_SINKS": sinks is not None, "HAS_GATE": gate is not None,
    }  # fmt: skip
    attend = {
        "q_ptr": query, "k_ptr": key_cache, "v_ptr": value_cache, "tiles_ptr": table,
        "pages_ptr": unused if page_table is None else page_table, "slopes_ptr": unused if alibi_slopes is None else alibi_slopes,
        "mask_ptr": unused if key_mask is None else as_bytes(key_mask),
        **strides("q", query), **strides("k", key_cache), **strides("v", value_cache),
        "stride_pb": 0 if page_table is None else page_table.stride(0), "stride_mb": 0 if key_mask is None else key_mask.stride(0),
        "tiles": table.shape[0], "scale": scale * LOG2E, "softcap": softcap * LOG2E,
    }  # fmt: skip
    attend_constants = {
        "HEAD_DIM": head_dim, "BLOCK_D": padded(head_dim), "BLOCK_M": sizes.block_m,
        "PAGE_SIZE": 0 if page_table is None else page_size, "SPLIT": splits > 1, "SOFTCAP": softcap > 0,
        "HAS_ALIBI": alibi_slopes is not None, "HAS_MASK": key_mask is not None,
    }  # fmt: skip
    first = Launch(
        attention_decode_kernel, (programs, splits), shared | attend, constants | attend_constants, sizes.warps, sizes.stages
    )
    # A row's splits in one go where they are not too many: every further one waits for memory again.
    at_once = 8 if splits <= 8 else 64 if value_dim <= 128 else 32
    merge = Launch(merge_splits_kernel, (batch * rows,), shared, constants | {"BLOCK_S": at_once}, 2 if splits <= 8 else 4, 1)
    return [first, merge] if splits > 1 else [first]


def strides(name: str, tensor: Tensor) -> dict[str, int]:
    return {f"stride_{name}{axis}": tensor.stride(i) for i, axis in enumerate("bhn" if name in "kv" else "bhm")}


def padded(dim: int) -> int:
    return max(16, triton.next_power_of_2(dim))


def aot_variants(capability: int) -> Iterator[AotVariant]:
    """Groups of 4 over long caches, contiguous and paged, one with every option, and one that fills a tile of 64 rows."""
    for name, dtype, dim, group, page, options in (
        ("bf16 d128", torch.bfloat16, 128, 4, 0, False),
        ("fp16 d64 pages of 16", torch.float16, 64, 4, 16, False),
        ("bf16 d128 pages of 256", torch.bfloat16, 128, 4, 256, False),
        ("bf16 d96 all options", torch.bfloat16, 96, 4, 0, True),
        ("bf16 d128 64 rows", torch.bfloat16, 128, 64, 0, False),
        ("bf16 d256 64 rows, pages of 16", torch.bfloat16, 256, 64, 16, False),
        ("fp32 d128", torch.float32, 128, 4, 0, False),
    ):
        empty = lambda *shape, dtype=dtype: torch.empty(shape, dtype=dtype, device="meta")  # noqa: E731
        query, output = empty(4, 8 * group, 1 + options, dim), empty(4, 8 * group, 1 + options, dim)
        cache = empty(4 * 4096 // page, 8, page, dim) if page else empty(4, 8, 4096, dim)
        extras = {"window": 512, "softcap": 30.0} if options else {}
        if options:
            extras |= {name: empty(8 * group, dtype=torch.float32) for name in ("alibi_slopes", "sinks", "gate")}
            extras["key_mask"] = empty(4, 4096, dtype=torch.bool)
        splits = 48 if options else 8
        attend, merge = launches(
            query, cache, cache, output, empty(4, 8 * group, 1 + options, dtype=torch.float32),
            tuple(range(0, 8 * group + 1, group)), lengths=empty(4, dtype=torch.int32), scale=0.1, splits=splits,
            page_table=empty(4, 4096 // page, dtype=torch.int32) if page else None, capability=capability, **extras,
        )  # fmt: skip
        # From sm_90 on the tensor cores' own instructions begin at 64 rows; smaller tiles run on mma.sync.
        cores = dtype != torch.float32 and (capability == 80 or group == 64)
        yield AotVariant(f"decode {name}", attend, cores)
        if options:
            yield AotVariant(f"decode merge {name}, {splits} splits", merge, tensor_cores=False)
