"""Tile sizes of the forward kernel: a checked-in table, so that nothing is tuned at import or at a first call.

Those of Hopper, head_dim 64 and 128, are the fastest of the candidates in bench/NOTES.md, measured on an H200 (bf16, 4096 tokens).
All others are untuned: what register and shared-memory use ahead of time (`make aot`) and published kernels suggest.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tile:
    block_m: int  # queries
    block_n: int  # keys
    warps: int
    stages: int


@dataclass(frozen=True)
class Tiles:
    """What a (architecture family, head_dim) pair uses, by what registers and shared memory must also hold."""

    full: Tile
    causal: Tile
    loaded: Tile  # statistics, a key mask, a window, a soft cap or ALiBi: more registers
    bias: Tile  # a bias, whose tile is as large as the scores


# 16-bit types, by (architecture family, head_dim up to).
_HALF = {
    (80, 64): Tiles(Tile(128, 64, 4, 3), Tile(128, 64, 4, 3), Tile(128, 64, 4, 3), Tile(64, 64, 4, 2)),
    (80, 128): Tiles(Tile(128, 64, 8, 3), Tile(128, 64, 8, 3), Tile(128, 32, 8, 3), Tile(64, 32, 4, 2)),
    (80, 256): Tiles(Tile(64, 32, 8, 2), Tile(64, 32, 8, 2), Tile(64, 32, 8, 2), Tile(64, 32, 8, 2)),
    (90, 64): Tiles(Tile(128, 64, 8, 3), Tile(128, 64, 8, 3), Tile(128, 64, 4, 3), Tile(128, 64, 8, 2)),
    (90, 128): Tiles(Tile(128, 64, 8, 3), Tile(128, 128, 8, 3), Tile(64, 64, 4, 3), Tile(128, 64, 8, 2)),
    (90, 256): Tiles(Tile(128, 64, 8, 2), Tile(128, 64, 8, 2), Tile(64, 64, 8, 2), Tile(64, 64, 8, 2)),
    (100, 64): Tiles(Tile(128, 128, 8, 3), Tile(128, 128, 8, 3), Tile(128, 64, 8, 3), Tile(128, 64, 8, 2)),
    (100, 128): Tiles(Tile(128, 128, 8, 2), Tile(128, 64, 8, 3), Tile(128, 64, 8, 3), Tile(128, 64, 8, 2)),
    (100, 256): Tiles(Tile(128, 64, 8, 2), Tile(128, 64, 8, 2), Tile(64, 64, 8, 2), Tile(64, 64, 8, 2)),
}
# fp32 runs on the FMA units, in true fp32.
_FP32 = {64: Tile(32, 32, 4, 2), 128: Tile(16, 32, 4, 2), 256: Tile(16, 16, 4, 1)}
_INTERPRETER = Tile(16, 16, 4, 1)


def forward_tile(capability: int, dtype: torch.dtype, dim: int, use: str) -> Tile:
    """The tile for compute capability 80, 86, 90, 100, 120, ... (0: the interpreter) and max(head_dim, value_dim) = `dim`.

    use: the field of `Tiles` that fits the call.
    """
    if capability == 0:
        return _INTERPRETER
    bucket = next(limit for limit in (64, 128, 256) if dim <= limit)
    if dtype == torch.float32:
        return _FP32[bucket]
    return getattr(_HALF[family(capability), bucket], use)


def family(capability: int) -> int:
    """The row of the table: 100 for data-centre Blackwell, 90 for Hopper, 80 for all others (Ampere, Ada, and consumer Blackwell,
    which have about 100 KB of shared memory or more and mma.sync)."""
    return capability if capability in (90, 100) else 100 if 100 < capability < 120 else 80
