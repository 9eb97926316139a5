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
def turns_of(programs, batch_heads, row_blocks, section):
    """How often every persistent program asks `place_of` for a tile."""
    tiles = batch_heads * row_blocks
    pairs = batch_heads * ((row_blocks + 1) // 2)
    return (tiles + programs - 1) // programs if section > 0 else (pairs + programs - 1) // programs * 2


@gluon.jit
def place_of(program, turn, programs, batch_heads, row_blocks, section):
    """(sample * heads + head, block of rows) of a program's tile in its turn-th turn; block -1: none.

    section > 0: the heads come in sections of so many. Inside a section the last block of every head comes first (under a causal
    mask the longest), and the tiles go back and forth over the programs: who got a long tile in one turn gets a short one in the
    next.
    section 0: a program takes the last block of a head and then the first, the last but one and the second, and so on: two tiles
    that cost the same together under a causal mask, whatever the number of heads. Neighbours work on the same head.
    """
    size = section if section > 0 else 1
    tile = turn * programs + (program if turn % 2 == 0 else programs - 1 - program)
    first_head = tile // (size * row_blocks) * size
    inside = tile - first_head * row_blocks
    left = batch_heads - first_head
    width = size if size < left or left < 1 else left
    tile_block = row_blocks - 1 - inside // width if tile < batch_heads * row_blocks else -1

    half = (row_blocks + 1) // 2
    pair = turn // 2 * programs + program
    low = pair % half
    high = row_blocks - 1 - low
    second = low if low < high else -1  # the block in the middle is alone
    pair_block = high if turn % 2 == 0 else second
    pair_block = pair_block if pair < batch_heads * half else -1

    place = first_head + inside % width if section > 0 else pair // half
    return place, tile_block if section > 0 else pair_block


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
