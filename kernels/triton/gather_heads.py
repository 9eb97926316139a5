"""Blocks of several tensors copied into new ones, in one launch: what surgery does to all weights of a layer on a GPU.

A tensor is rows of blocks; the same blocks stay in every row. A table says for each tensor where it lies and how its blocks are
laid out, and behind that which blocks stay. A program copies ROWS rows of WORDS words of one block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor

from headprune.kernels.launch import AotVariant, Launch
from headprune.kernels.weight_plan import addresses_of

ROWS, WORDS = 32, 32
FIELDS = 10
WORD_TYPES = {8: tl.int64, 4: tl.int32, 2: tl.int16, 1: tl.int8}


@triton.jit(do_not_specialize=["tensors"])
def gather_heads_kernel(table_ptr, tensors, WORD: tl.constexpr, FIELDS: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    tensor = 0
    for number in tl.range(1, tensors):
        tensor = tl.where(program >= tl.load(table_ptr + number * FIELDS), number, tensor)
    entry = table_ptr + tensor * FIELDS
    inside = program - tl.load(entry)
    source = tl.load(entry + 1).to(tl.pointer_type(WORD))
    target = tl.load(entry + 2).to(tl.pointer_type(WORD))
    rows, blocks, words = tl.load(entry + 3), tl.load(entry + 4), tl.load(entry + 5)
    source_row, target_row, step = tl.load(entry + 6), tl.load(entry + 7), tl.load(entry + 8)
    across = tl.cdiv(words, WORDS)
    column = inside % across * WORDS + tl.arange(0, WORDS)
    block = inside // across % blocks
    row = inside // across // blocks * ROWS + tl.arange(0, ROWS)
    chosen = tl.load(table_ptr + tl.load(entry + 9) + block)
    mask = (row < rows)[:, None] & (column < words)[None, :]
    words_of_tile = tl.load(source + chosen * step + row[:, None] * source_row + column[None, :], mask=mask)
    tl.store(target + block * step + row[:, None] * target_row + column[None, :], words_of_tile, mask=mask)


@dataclass(frozen=True)
class Gather:
    """`source`, contiguous, seen as [rows, blocks, `size` elements]; `blocks` (int64, on the CPU) of every row go to `target`
    [rows, len(blocks), size], contiguous, of the same dtype."""

    source: Tensor
    target: Tensor
    rows: int
    blocks: Tensor
    size: int


def gather_launch(gathers: Sequence[Gather]) -> Launch:
    """Copies all of them; none empty, all on one device."""
    places = addresses_of(tuple(tensor for one in gathers for tensor in (one.source, one.target)))
    bytes_of_block = [one.size * one.source.element_size() for one in gathers]
    word = gcd(8, *places, *bytes_of_block)
    entries, chosen, programs, behind = [], [], 0, FIELDS * len(gathers)
    for number, (one, block_bytes) in enumerate(zip(gathers, bytes_of_block)):
        step = block_bytes // word
        row_words = one.source.numel() * one.source.element_size() // word // one.rows
        rows, words, source_row, target_row = one.rows, step, row_words, len(one.blocks) * step
        if rows == 1 and step % WORDS == 0:  # one row of long blocks: a block's own words are the rows
            rows, words, source_row, target_row = step // WORDS, WORDS, WORDS, WORDS
        source, target = places[2 * number : 2 * number + 2]
        blocks = len(one.blocks)
        entries += [programs, source, target, rows, blocks, words, source_row, target_row, step, behind]
        chosen.append(one.blocks)
        programs += triton.cdiv(rows, ROWS) * blocks * triton.cdiv(words, WORDS)
        behind += blocks
    table = torch.cat([torch.tensor(entries), *chosen]).to(gathers[0].target.device)
    constants = {"WORD": WORD_TYPES[word], "FIELDS": FIELDS, "ROWS": ROWS, "WORDS": WORDS}
    return Launch(gather_heads_kernel, (programs,), {"table_ptr": table, "tensors": len(gathers)}, constants, warps=4, stages=1)


def aot_variants(_capability: int) -> Iterator[AotVariant]:
    source, target = (torch.empty(64, heads * 128, device="meta", dtype=torch.bfloat16) for heads in (8, 6))
    launch = gather_launch([Gather(source, target, 64, torch.arange(6), 128)])
    yield AotVariant("gather_heads words of 8 bytes", launch, tensor_cores=False)
