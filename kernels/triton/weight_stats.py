"""Statistics of every head's weights, of all layers of a model in one launch that reads each weight once.

A table (weight_plan.py) says which part of which tensor a program reads; tensors are found through a table of addresses. A second,
tiny launch adds up the partial sums of each head in a fixed order: no atomics, the same bits in every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from headprune.kernels.launch import Launch
from headprune.kernels.weight_plan import FIELDS, ChunkPlan, address_table, addresses_of, chunk_plan, matrices_of, row_length

_ELEMENTS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
TILE = 1024  # elements that a program loads at once, times UNROLL
UNROLL = 4
WARPS = 4


@triton.jit
def pointer(addresses_ptr, tensor, offset, ELEMENT: tl.constexpr, ALIGNED: tl.constexpr):
    """Element `offset` of a tensor; with ALIGNED both begin at 16 bytes."""
    found = tl.load(addresses_ptr + tensor).to(tl.pointer_type(ELEMENT))
    if ALIGNED:
        found = tl.multiple_of(found, 16)
    return found + offset


@triton.jit(do_not_specialize=["slots"])
def weight_stats_kernel(
    table_ptr, weights_ptr, grads_ptr, partial_ptr, slots,
    ELEMENT: tl.constexpr, WHOLE: tl.constexpr, ALIGNED: tl.constexpr, TABLE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """One program: one chunk. partial: fp32 [statistics, slots]. WHOLE elements divide all that the table holds."""
    entry = table_ptr + tl.program_id(0).to(tl.int64) * TABLE
    tensor = tl.load(entry)
    offset = tl.multiple_of(tl.load(entry + 1), WHOLE)
    count = tl.multiple_of(tl.load(entry + 2), WHOLE).to(tl.int32)
    columns = tl.multiple_of(tl.load(entry + 3), WHOLE).to(tl.int32)
    stride = tl.multiple_of(tl.load(entry + 4), WHOLE)
    w_ptr = pointer(weights_ptr, tensor, offset, ELEMENT, ALIGNED)
    l1 = tl.zeros([ROWS, COLUMNS], tl.float32)
    square = tl.zeros([ROWS, COLUMNS], tl.float32)
    largest = tl.zeros([ROWS, COLUMNS], tl.float32)
    if grads_ptr is not None:
        g_ptr = pointer(grads_ptr, tensor, offset, ELEMENT, ALIGNED)
        dot = tl.zeros([ROWS, COLUMNS], tl.float32)
        dot_abs = tl.zeros([ROWS, COLUMNS], tl.float32)
        dot_square = tl.zeros([ROWS, COLUMNS], tl.float32)
    column = tl.arange(0, COLUMNS)[None, :]
    for first in tl.range(0, tl.cdiv(count, columns), ROWS * UNROLL):
        for step in tl.static_range(UNROLL):
            row = first + step * ROWS + tl.arange(0, ROWS)[:, None]
            at = row * stride + column
            inside = (column < columns) & (column < count - row * columns)
            w = tl.load(w_ptr + at, mask=inside, other=0.0).to(tl.float32)
            size = tl.abs(w)
            l1 += size
            square += w * w
            largest = tl.maximum(largest, size)
            if grads_ptr is not None:
                product = w * tl.load(g_ptr + at, mask=inside, other=0.0).to(tl.float32)
                dot += product
                dot_abs += tl.abs(product)
                dot_square += product * product
    out_ptr = partial_ptr + tl.load(entry + 5)
    plane = slots.to(tl.int64)
    tl.store(out_ptr, tl.sum(l1))
    tl.store(out_ptr + plane, tl.sum(square))
    tl.store(out_ptr + 2 * plane, tl.max(largest))
    if grads_ptr is not None:
        tl.store(out_ptr + 3 * plane, tl.sum(dot))
        tl.store(out_ptr + 4 * plane, tl.sum(dot_abs))
        tl.store(out_ptr + 5 * plane, tl.sum(dot_square))


@triton.jit
def slot_sum(ptr, first, stop, BLOCK: tl.constexpr):
    sums = tl.zeros([BLOCK], tl.float32)
    for at in tl.range(first, stop, BLOCK):
        slot = at + tl.arange(0, BLOCK)
        sums += tl.load(ptr + slot, mask=slot < stop, other=0.0)
    return tl.sum(sums, 0)


@triton.jit
def slot_max(ptr, first, stop, BLOCK: tl.constexpr):
    found = tl.zeros([BLOCK], tl.float32)
    for at in tl.range(first, stop, BLOCK):
        slot = at + tl.arange(0, BLOCK)
        found = tl.maximum(found, tl.load(ptr + slot, mask=slot < stop, other=0.0))
    return tl.max(found, 0)


@triton.jit(do_not_specialize=["heads", "slots"])
def weight_totals_kernel(
    partial_ptr, offsets_ptr, stats_ptr, heads, slots, STATISTICS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """One program: one head. stats: fp32 [STATISTICS, heads]."""
    head = tl.program_id(0)
    first, stop = tl.load(offsets_ptr + head), tl.load(offsets_ptr + head + 1)
    plane = slots.to(tl.int64)
    l1 = slot_sum(partial_ptr, first, stop, BLOCK)
    tl.store(stats_ptr + head, l1)
    tl.store(stats_ptr + heads + head, slot_sum(partial_ptr + plane, first, stop, BLOCK))
    largest = slot_max(partial_ptr + 2 * plane, first, stop, BLOCK)
    # Maxima pass over NaN; the sum of magnitudes is NaN where a weight is, and only there.
    tl.store(stats_ptr + 2 * heads + head, tl.where(l1 == l1, largest, l1))
    for row in tl.static_range(3, STATISTICS):
        tl.store(stats_ptr + row * heads + head, slot_sum(partial_ptr + row * plane, first, stop, BLOCK))


def weight_stats_launches(
    weights: tuple[Tensor, ...], grads: tuple[Tensor, ...], dims: tuple[int, ...], spans: tuple[tuple[int, ...], ...], stats: Tensor
) -> list[Launch]:
    """Fill stats [3 or 6, heads]: sum |w|, sum w^2, max |w|; sum w g, sum |w g|, sum (w g)^2 where there are gradients.

    weights: matrices of one dtype with a stride of 1; grads: laid out like them, or none. spans as in `chunk_plan`.
    """
    matrices = matrices_of(weights, dims)
    columns = row_length(matrices, spans)
    plan = chunk_plan(matrices, spans, stats.shape[1], columns, stats.device)
    slots = plan.table.shape[0]
    partial = stats.new_empty((stats.shape[0], slots))
    kernel = chunk_launch(weights, grads, plan, columns, partial)
    arguments = {"partial_ptr": partial, "offsets_ptr": plan.offsets, "stats_ptr": stats, "heads": stats.shape[1], "slots": slots}
    constants = {"STATISTICS": stats.shape[0], "BLOCK": 64}
    return [kernel, Launch(weight_totals_kernel, (stats.shape[1],), arguments, constants, warps=1, stages=1)]


def chunk_launch(weights: tuple[Tensor, ...], grads: tuple[Tensor, ...], plan: ChunkPlan, columns: int, partial: Tensor) -> Launch:
    places, grad_places = addresses_of(weights), addresses_of(grads)
    aligned = all(place % 16 == 0 for place in places + grad_places)
    whole = min(plan.whole, 16 // weights[0].element_size()) if aligned else 1
    arguments = {
        "table_ptr": plan.table, "weights_ptr": address_table(places, partial.device),
        "grads_ptr": address_table(grad_places, partial.device) if grads else None, "partial_ptr": partial,
        "slots": partial.shape[1],
    }  # fmt: skip
    constants = {
        "ELEMENT": _ELEMENTS[weights[0].dtype], "WHOLE": whole, "ALIGNED": aligned, "TABLE": FIELDS, "ROWS": TILE // columns,
        "COLUMNS": columns, "UNROLL": UNROLL,
    }  # fmt: skip
    return Launch(weight_stats_kernel, (plan.table.shape[0],), arguments, constants, warps=WARPS, stages=1)


def weight_stats(
    weights: tuple[Tensor, ...], grads: tuple[Tensor, ...], dims: tuple[int, ...], spans: tuple[tuple[int, ...], ...], stats: Tensor
) -> None:
    for launch in weight_stats_launches(weights, grads, dims, spans, stats):
        launch.run()
