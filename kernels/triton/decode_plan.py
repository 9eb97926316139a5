"""How a decode attention is cut into pieces, decided on the host without reading a length: for the Triton and the CUDA kernel.

The query heads of a group times the new tokens are *rows*; row head * new + i is new token i of a query head, so that a group's
rows are neighbours. A *tile* is up to block_m rows of one group. The keys of a sample are cut into *splits*, evenly by its
real length, which the kernel reads on the device.
"""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import torch
from torch import Tensor

# Fewer keys than this a split do not pay for its merging.
LEAST_KEYS = 256
# With as many keys as this a split, merging costs under 1 %: more splits than fill the device once even out unequal lengths.
MANY_KEYS = 2048
MOST_SPLITS = 128


@cache  # never emptied: CUDA graphs hold on to the tables
def tile_table(group_offsets: tuple[int, ...], new: int, block_m: int, device: torch.device) -> Tensor:
    """int32 [tiles, 3]: key/value head, first row, row behind the last one. `group_offsets` as in HeadMap.

    Copied to the device on the first call, which therefore cannot be inside the capture of a CUDA graph.
    """
    tiles = [
        (kv_head, first, min(first + block_m, stop * new))
        for kv_head, (start, stop) in enumerate(pairwise(group_offsets))
        for first in range(start * new, stop * new, block_m)
    ]
    return torch.tensor(tiles, dtype=torch.int32, device=device).reshape(-1, 3)


def most_rows(group_offsets: tuple[int, ...], new: int) -> int:
    """Rows of the largest group."""
    return new * max((stop - start for start, stop in pairwise(group_offsets)), default=0)


def split_count(programs: int, capacity: int, slots: int) -> int:
    """Splits of each sample's keys: as many as fill `slots` programs at a time once or, where the keys are long anyway, two to four
    times. In between the last programs would have the memory to themselves and not use it (on an H200, one sample of 128k keys:
    153 us with 512 programs for 396 slots, 139 us with 256 or 384).

    `programs` (samples x tiles) run without any split; a sample holds at most `capacity` keys.
    """
    programs = max(programs, 1)
    once = min(slots // programs, capacity // LEAST_KEYS)
    more = [times * slots // programs for times in (2, 3, 4) if times * slots // programs * MANY_KEYS <= capacity]
    return max(1, min(max(once, *more, 0), MOST_SPLITS))


@cache
def multiprocessors(device: torch.device) -> int:
    """Of the GPU; 1 elsewhere (Triton's interpreter)."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
