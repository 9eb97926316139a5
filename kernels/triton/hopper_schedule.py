"""The integer arithmetic that the warps of `attention_forward_hopper` agree on: which tile, which buffer, which phase.

Gluon functions on the GPU; `.fn` of each is the same function in plain Python, which is how the tests run them.
"""

from __future__ import annotations

from triton.experimental import gluon


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
def tile_of(program, turn, programs):
    """The tile that a persistent program computes in its turn-th turn, back and forth over the programs: who got a long tile
    in one turn gets a short one in the next."""
    return turn * programs + (program if turn % 2 == 0 else programs - 1 - program)


@gluon.jit
def place_of(tile, batch_heads, row_blocks, section):
    """(sample * heads + head, block of rows) of a tile.

    Heads come in sections, so few that their keys and values stay in L2 together; inside a section the last block of every
    head comes first (under a causal mask the longest).
    """
    first_head = tile // (section * row_blocks) * section
    inside = tile - first_head * row_blocks
    left = batch_heads - first_head
    width = left if left < section else section
    turn = inside // width
    return first_head + inside - turn * width, row_blocks - 1 - turn


@gluon.jit
def key_blocks(block, q_len, kv_len, BLOCK_M, BLOCK_N, CAUSAL):
    """(how many key blocks the rows of `block` attend to, how many of these, counted from the last, need a mask)."""
    stop = kv_len
    unmasked = kv_len // BLOCK_N
    if CAUSAL:
        # The first row sees the keys up to its own position, the last row BLOCK_M - 1 more.
        seen = block * BLOCK_M + kv_len - q_len + 1
        stop = seen + BLOCK_M - 1 if seen + BLOCK_M - 1 < kv_len else kv_len
        unmasked = seen // BLOCK_N if seen // BLOCK_N < unmasked else unmasked
    count = (stop + BLOCK_N - 1) // BLOCK_N
    return count, count - unmasked
