"""In which order the programs of a forward kernel take their tiles (one tile: BLOCK_M queries of one head of one sample).

The grid is one-dimensional and the hardware hands out program numbers in ascending order, each to the next free SM: so an order
by falling length is a longest-first schedule without a persistent kernel's static split, and no head count or causal triangle
leaves SMs idle but in the last fraction of a tile. (32 heads pruned to 27, 4096 queries, causal: 864 tiles of 128 queries. A
fixed split over 132 SMs gives 6.5 tiles each, so 7 of unlike lengths; the queue ends with the shortest tiles.)

Tiles come in sections of (sample, head) pairs whose keys and values fit in L2 together. Inside a section the block of queries is
the slow index, last block first, and the head the fast one: the heads of one group, which read the same keys, run side by side.
"""

from __future__ import annotations

from functools import lru_cache

import torch

import triton
import triton.language as tl

ASSUMED_L2_BYTES = 40 << 20


@triton.jit
def tile_of(program, heads, pairs, blocks, section):
    """(sample, head, block) of a program; `pairs` is batch * heads, `section` how many of them share L2."""
    part = program // (section * blocks)
    first = part * section
    width = tl.minimum(section, pairs - first)
    inside = program - first * blocks
    pair = first + inside % width
    return pair // heads, pair % heads, blocks - 1 - inside // width


def section_pairs(pairs: int, group: float, kv_bytes: int, device: torch.device) -> int:
    """How many (sample, query head) pairs to a section. `kv_bytes`: keys and values of one head of one sample; `group`: query
    heads per key/value head. Half of L2 is left to everything else."""
    sharing = max(1, l2_bytes(device) // 2 // max(kv_bytes, 1)) * group
    sections = max(1, round(pairs / sharing))
    return max(1, -(-pairs // sections))


@lru_cache(maxsize=64)
def l2_bytes(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else ASSUMED_L2_BYTES
