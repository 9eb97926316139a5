"""Tile sizes of the backward kernels, by architecture, dtype and head_dim: a checked-in table.

Those of Hopper, head_dim 64 and 128, are the fastest of the candidates in bench/NOTES.md, measured on an H200 (bf16, 4096 tokens).
All others are untuned: the largest whose inner loops keep everything in registers (`make aot`).
"""

from __future__ import annotations

import torch

from headprune.kernels.tiles import Tile, family

ROWS_OF_DELTA = 64


# 16-bit types, by (architecture family, max(head_dim, value_dim) up to).
_DKDV = {
    (80, 64): Tile(64, 128, 8, 2), (80, 128): Tile(64, 64, 8, 2), (80, 256): Tile(32, 32, 8, 1),
    (90, 64): Tile(32, 128, 4, 2), (90, 128): Tile(32, 64, 4, 2), (90, 256): Tile(32, 64, 8, 2),
    (100, 64): Tile(32, 128, 8, 2), (100, 128): Tile(32, 64, 8, 2), (100, 256): Tile(32, 64, 8, 1),
}  # fmt: skip
_DQ = {
    (80, 64): Tile(128, 64, 8, 2), (80, 128): Tile(64, 64, 8, 2), (80, 256): Tile(32, 32, 8, 1),
    (90, 64): Tile(64, 64, 4, 3), (90, 128): Tile(128, 64, 8, 3), (90, 256): Tile(64, 32, 8, 2),
    (100, 64): Tile(128, 64, 8, 2), (100, 128): Tile(128, 64, 8, 2), (100, 256): Tile(64, 32, 8, 1),
}  # fmt: skip


def dkdv_tile(capability: int, dtype: torch.dtype, dim: int) -> Tile:
    """Tile for compute capability 80, 86, 90, 100, ... (0: Triton's interpreter) and max(head_dim, value_dim) = `dim`."""
    if capability == 0:
        return Tile(16, 32, 4, 1)
    if dtype == torch.float32:
        return Tile(16, 32, 4, 1) if dim <= 64 else Tile(16, 16, 4, 1)
    return _DKDV[family(capability), bucket(dim)]


def dq_tile(capability: int, dtype: torch.dtype, dim: int, biased: bool = False) -> Tile:
    """As `dkdv_tile`; a bias needs registers for its own tile."""
    if capability == 0:
        return Tile(32, 16, 4, 1)
    if dtype == torch.float32:
        return Tile(32, 16, 4, 1) if dim <= 64 else Tile(16, 16, 4, 1)
    if biased:
        return Tile(64, 32, 8, 1)
    return _DQ[family(capability), bucket(dim)]


def bucket(dim: int) -> int:
    return next(limit for limit in (64, 128, 256) if dim <= limit)


def closed_gate_tile(dtype: torch.dtype, dim: int) -> Tile:
    """As `dkdv_tile`, for every architecture; its rows are those of the delta kernel."""
    if dtype == torch.float32:
        return Tile(ROWS_OF_DELTA, 16, 4, 1)
    return Tile(ROWS_OF_DELTA, 64 if dim <= 128 else 32, 4, 2)
