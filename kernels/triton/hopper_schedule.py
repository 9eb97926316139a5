"""The integer arithmetic that the warps of `attention_forward_hopper` agree on: which tile, which buffer, which phase.

Gluon functions on the GPU; `.fn` of each is the same function in plain Python, which is how the tests run them.

Tiles are handed out in pairs that cost the same (`paired`) for as many rounds as all programs have one. What is left then, between
one and two rounds, is too few for that: who got one pair more would leave all others idle. The host spreads it tile by tile
(`rest_of_tiles`) into a table of what each program does last.
"""

from __future__ import annotations

import heapq

import numpy
import torch
from torch import Tensor
from triton.experimental import gluon

from headprune.kernels.cached_table import cached_table

PER_TILE = 192  # keys for which a tile's start and end stand


@gluon.jit
def slot(count, STAGES):
    """Where the count-th item of a ring of STAGES buffers lies."""
    return count % STAGES


@gluon.jit
def filled_phase(count, STAGES):
    """The parity to wait for on the `full` barrier of the count-th item's slot, before reading it."""
    return (count // STAGES) & 1


@gluon.jit
def freed_phase(count, STAGES):
    """The parity to wait for on the slot's `empty` barrier, before writing the count-th item: its previous item was used.

    A barrier that has not completed any phase lets through whoever waits for parity 1: in the first round every slot is free.
    """
    return ((count // STAGES) & 1) ^ 1


@gluon.jit
def turn_phase(count, WHO):
    """The parity to wait for on consumer WHO's turn barrier before its count-th block; consumer 0 has the first turn."""
    return ((count & 1) ^ 1) if WHO == 0 else (count & 1)


@gluon.jit
def paired(program, turn, programs, row_blocks):
    """(sample * heads + head, block of rows) of a program's tile in its turn-th turn: the last block of a head, then the first, the
    last but one and the second, and so on. Two such tiles cost the same together under a causal mask, and neighbours work on the
    same head. Block -1: none, the block in the middle is alone."""
    half = (row_blocks + 1) // 2
    pair = turn // 2 * programs + program
    low = pair % half
    high = row_blocks - 1 - low
    second = low if low < high else -1
    return pair // half, high if turn % 2 == 0 else second


@gluon.jit
def key_blocks(block, q_len, kv_len, BLOCK_M, BLOCK_N, CAUSAL):
    """(how many key blocks the rows of `block` attend to, how many of these, counted from the last, need a mask)."""
    stop = kv_len
    unmasked = kv_len // BLOCK_N
    if CAUSAL:
        # The first row sees the keys up to its own position, the last row BLOCK_M - 1 more. With fewer keys than queries the rows
        # in front of the first key see nothing.
        seen = block * BLOCK_M + kv_len - q_len + 1
        last = seen + BLOCK_M - 1 if seen + BLOCK_M > 1 else 0
        seen = seen if seen > 0 else 0
        stop = last if last < kv_len else kv_len
        unmasked = seen // BLOCK_N if seen // BLOCK_N < unmasked else unmasked
    count = (stop + BLOCK_N - 1) // BLOCK_N
    return count, count - unmasked


def pair_rounds(batch_heads: int, row_blocks: int, programs: int) -> int:
    """How many rounds of pairs are handed out before the rest is spread."""
    return max(0, batch_heads * ((row_blocks + 1) // 2) // programs - 1)


@cached_table(256)
def rest_of_tiles(
    batch_heads: int, row_blocks: int, block_m: int, ahead: int | None, kv_len: int, programs: int, device: torch.device
) -> Tensor:
    """int32 [programs, turns]: place * row_blocks + block of the tiles that each program takes behind the `pair_rounds`, -1 where
    it has no more. The longest first, each to the program with the least to do (Graham 1969, longest processing time).

    ahead: kv_len - q_len under a causal mask, None without.
    """
    ends = numpy.arange(1, row_blocks + 1) * block_m + (kv_len if ahead is None else ahead)
    work = ends.clip(0, kv_len) + PER_TILE
    half, rounds = (row_blocks + 1) // 2, pair_rounds(batch_heads, row_blocks, programs)
    of_pair = work[::-1][:half] + work[:half]
    of_pair[half - 1] -= work[half - 1] if row_blocks % 2 else 0
    loads = of_pair[numpy.arange(rounds * programs) % half].reshape(rounds, programs).sum(axis=0)
    programs_by_load = [(int(load), program) for program, load in enumerate(loads)]
    heapq.heapify(programs_by_load)
    left = range(rounds * programs, batch_heads * half)
    tiles = {pair // half * row_blocks + block for pair in left for block in (pair % half, row_blocks - 1 - pair % half)}
    own: list[list[int]] = [[] for _ in range(programs)]
    for tile in sorted(tiles, key=lambda tile: (-work[tile % row_blocks], tile)):
        load, program = heapq.heappop(programs_by_load)
        own[program].append(tile)
        heapq.heappush(programs_by_load, (load + int(work[tile % row_blocks]), program))
    turns = max(map(len, own))
    return torch.tensor([mine + [-1] * (turns - len(mine)) for mine in own], dtype=torch.int32, device=device)
