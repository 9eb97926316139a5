"""How the weights of a whole model are cut into chunks of work, decided once for a layout: for the Triton and the CUDA kernel.

A *block* is what one head owns of one span: rows of neighbouring elements. A *chunk* is a part of a block that one program reads:
`count` elements, `columns` in each row, rows `stride` elements apart. A block without gaps is one long row, which chunks cut into
rows of their own. Every chunk writes partial sums into its *slot*; a head's slots are neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from headprune.kernels.cached_table import cached_table

CHUNK_ELEMENTS = 1 << 15
FIELDS = 7  # of the table: tensor, offset, count, columns, stride, slot, head


@dataclass(frozen=True)
class Matrix:
    """The geometry of one weight; strides in elements, one of them 1."""

    shape: tuple[int, int]
    strides: tuple[int, int]
    dim: int  # along which the heads lie


@dataclass(frozen=True)
class ChunkPlan:
    """table: int64 [chunks, FIELDS]; offsets: int32 [heads + 1], a head's first slot and the one behind its last.

    `whole` elements divide every offset, count, row and stride: what may be read at a time.
    """

    table: Tensor
    offsets: Tensor
    whole: int


@cached_table(16)
def chunk_plan(
    matrices: tuple[Matrix, ...], spans: tuple[tuple[int, ...], ...], heads: int, row: int, device: torch.device
) -> ChunkPlan:
    """The chunks of `spans` (six numbers each: matrix, first head, heads, first feature, stride, width), none with rows longer
    than `row`, a power of two.

    Copied to the device on the first call, which therefore cannot be inside the capture of a CUDA graph."""
    parts = [span_chunks(index, matrices[index], rest, row) for index, *rest in spans]
    table = np.concatenate([np.zeros((0, FIELDS), np.int64), *parts])
    order = np.argsort(table[:, 6], kind="stable")
    table[order, 5] = np.arange(len(table))
    offsets = np.concatenate([[0], np.cumsum(np.bincount(table[:, 6], minlength=heads))])
    # A stride of a chunk with one row is never used.
    used = np.where(table[:, 2] > table[:, 3], table[:, 4], 0)
    whole = int(np.gcd.reduce(np.concatenate([[16], table[:, 1], table[:, 2], table[:, 3], used])))
    return ChunkPlan(torch.from_numpy(table).to(device), torch.from_numpy(offsets).int().to(device), whole)


def span_chunks(index: int, matrix: Matrix, span: list[int], row: int) -> np.ndarray:
    """[chunks, FIELDS] of one span, slots not yet numbered."""
    head, heads, start, stride, width = span
    feature, other = matrix.strides[matrix.dim], matrix.strides[1 - matrix.dim]
    others = matrix.shape[1 - matrix.dim]
    along = feature == 1 and not (other == 1 and others > 1)
    rows, columns, row_stride = (others, width, other) if along else (width, others, feature)
    if not heads or not rows or not columns:
        return np.zeros((0, FIELDS), np.int64)
    firsts = (start + stride * np.arange(heads)) * feature
    if rows == 1 or row_stride == columns:
        part = flat_chunks(rows * columns, row)
    else:
        part = row_chunks(rows, columns, row_stride, row)
    # Chunk by chunk, within it head by head: heads side by side in memory are read at the same time.
    chunks, names = np.repeat(part, heads, axis=0), np.tile(np.arange(heads), len(part))
    zeros = np.zeros(len(chunks), np.int64)
    offset, count, length, distance = chunks.T
    columns_of_table = [zeros + index, offset + firsts[names], count, length, distance, zeros, head + names]
    return np.stack(columns_of_table, axis=1)


def flat_chunks(elements: int, row: int) -> np.ndarray:
    """[chunks, 4]: offset, count, columns, stride of one long row."""
    offsets = np.arange(0, elements, CHUNK_ELEMENTS)
    counts = np.minimum(CHUNK_ELEMENTS, elements - offsets)
    return np.stack([offsets, counts, np.full_like(offsets, row), np.full_like(offsets, row)], axis=1)


def row_chunks(rows: int, columns: int, stride: int, row: int) -> np.ndarray:
    """[chunks, 4] of rows with gaps between them, in strips of at most `row` columns."""
    strips = np.arange(0, columns, row)
    each = CHUNK_ELEMENTS // row
    starts, strips = (grid.ravel() for grid in np.meshgrid(np.arange(0, rows, each), strips, indexing="ij"))
    lengths = np.minimum(row, columns - strips)
    counts = np.minimum(each, rows - starts) * lengths
    return np.stack([starts * stride + strips, counts, lengths, np.full_like(starts, stride)], axis=1)


def row_length(matrices: tuple[Matrix, ...], spans: tuple[tuple[int, ...], ...]) -> int:
    """The shortest power of two, 16 to 256, that holds the rows of the heads that lie side by side in memory."""
    widths = [span[5] for span in spans if matrices[span[0]].strides[matrices[span[0]].dim] == 1]
    return max(16, min(256, 1 << (max(widths, default=128) - 1).bit_length()))


# Its content is its key, so that a call inside the capture of a CUDA graph copies nothing. Not kept for ever, since gradients
# change their addresses with every batch.
@cached_table(64)
def address_table(addresses: tuple[int, ...], device: torch.device) -> Tensor:
    """int64 [tensors]: where each tensor begins."""
    return torch.tensor(addresses, dtype=torch.int64, device=device)


def addresses_of(tensors: tuple[Tensor, ...]) -> tuple[int, ...]:
    """0 for tensors on the "meta" device."""
    return tuple(0 if tensor.is_meta else tensor.data_ptr() for tensor in tensors)


def matrices_of(weights: tuple[Tensor, ...], dims: tuple[int, ...]) -> tuple[Matrix, ...]:
    return tuple(Matrix(tuple(w.shape), tuple(w.stride()), dim) for w, dim in zip(weights, dims))
