"""Padded batches run in pieces, each of samples of like length: padding costs as much as tokens do, and nobody reads what it gives.

Only for passes that want each sample's states, not for losses, which may compare the samples of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from headprune.models.padding import close, complete, lengths_of, part_of
from headprune.models.tokens import SiteTokenMask
from headprune.surgery.parts import Part, weight_and_bias
from headprune.surgery.readout import states_and_output

PASS_COST = {"cpu": 256}  # places in whose time a further pass begins and ends; of MiniLM's 128 to 512 (bench/NOTES.md)
PASS_COST_OF_ACCELERATORS = 8192  # many launches; not measured


@dataclass(frozen=True)
class Piece:
    """What runs together: `rows` of the batch `of`, as long as the longest of them; rows None: the batch as it was given."""

    batch: Any
    of: int
    rows: Tensor | None = None


def whole(batches: Sequence[Any]) -> list[Piece]:
    return [Piece(batch, index) for index, batch in enumerate(batches)]


def pieces_of(batches: Sequence[Any], run: Callable[[Any], Any], parts: Sequence[Part], masks: SiteTokenMask) -> list[Piece]:
    """Each of `batches` in the pieces that take the least time, in order; whole where it has no padding, or where the first that
    has shows that `run` gives samples something else in pieces than in the batch."""
    if not parts:
        return whole(batches)
    cost = PASS_COST.get(weight_and_bias(parts[-1])[0].device.type, PASS_COST_OF_ACCELERATORS)
    found = [list(split(batch, index, cost)) for index, batch in enumerate(batches)]
    cut = [(batch, pieces) for batch, pieces in zip(batches, found) if pieces[0].rows is not None]
    if not cut:
        return whole(batches)
    expected = states_and_output(partial(run, cut[0][0]), parts[-1])
    try:
        names = [part.name for part in parts]
        fits = all(complete(batch, [piece.batch for piece in pieces], names, masks) for batch, pieces in cut)
        fits = fits and same(expected, cut[0][1], run, parts[-1], masks)
    except Exception:  # the user's own function or mask need not be one for some of a batch's samples
        fits = False
    return [piece for pieces in found for piece in pieces] if fits else whole(batches)


def split(batch: Any, of: int, cost: int) -> Iterator[Piece]:
    """The pieces of `batch` whose places, with `cost` places for each piece, are fewest."""
    lengths = lengths_of(batch)
    tokens = 0 if lengths is None else batch["attention_mask"].shape[1]
    groups = [] if lengths is None else cheapest(lengths.tolist(), cost)
    if lengths is None or sum(len(rows) * width + cost for rows, width in groups) >= len(lengths) * tokens + cost:
        yield Piece(batch, of)
        return
    for chosen, width in groups:
        rows = torch.tensor(chosen)
        yield Piece(part_of(batch, width, rows), of, rows)


def cheapest(lengths: Sequence[int], cost: int) -> list[tuple[list[int], int]]:
    """(samples, the length of the longest) of groups by length: the sum of samples x longest + cost is least."""
    rows_of: dict[int, list[int]] = {}
    for row, length in enumerate(lengths):
        rows_of.setdefault(length, []).append(row)
    steps = sorted(rows_of)
    best, cut = [0], [0]  # of the samples of the first so many lengths
    for end in range(1, len(steps) + 1):
        samples, options = 0, []
        for start in range(end - 1, -1, -1):
            samples += len(rows_of[steps[start]])
            options.append((best[start] + samples * steps[end - 1] + cost, start))
        least, start = min(options)
        best.append(least)
        cut.append(start)
    groups, end = [], len(steps)
    while end:
        groups.append((sorted(row for length in steps[cut[end] : end] for row in rows_of[length]), steps[end - 1]))
        end = cut[end]
    return groups[::-1]


def same(
    expected: tuple[Tensor, Tensor], pieces: Sequence[Piece], run: Callable[[Any], Any], last: Part, masks: SiteTokenMask
) -> bool:
    """Whether all that counts is in the pieces what it is in the batch: the states at the last part, and the output."""
    for piece in pieces:
        mask = masks(last.name, piece.batch)
        found = states_and_output(partial(run, piece.batch), last)
        if mask is None or not all(alike(*pair, piece.rows, mask.bool()) for pair in zip(expected, found)):
            return False
    return True


def alike(expected: Tensor, found: Tensor, rows: Tensor | None, valid: Tensor) -> bool:
    """Whether found [samples of the piece, ..] is what expected [samples of the batch, ..] has in `rows`; of [samples, tokens,
    features] at its `valid` places."""
    if rows is None or len(found) != len(rows) or len(expected) <= int(rows.max()):
        return False
    expected = expected[rows.to(expected.device)]
    if found.dim() > 2 and found.shape[:2] == valid.shape:
        valid = valid.to(found.device)
        expected, found = expected[:, : found.shape[1]][valid], found[valid]
    return close(expected, found)
