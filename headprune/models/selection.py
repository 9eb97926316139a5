"""Heads picked out of a tensor that was made for all of them, by slices alone: no index tensor, so nothing to move between
devices, to save or to trace."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from headprune.models.behaviour import Behaviour


def select_heads(tensor: Tensor, heads: Sequence[int], dim: int, width: int = 1) -> Tensor:
    """The entries of `heads` (ascending or not) along `dim`, where each head has `width` neighbouring ones; a copy unless
    the heads are neighbours themselves."""
    parts = [tensor.narrow(dim, first * width, count * width) for first, count in runs(heads)]
    return torch.cat(parts, dim) if parts else tensor.narrow(dim, 0, 0)


def runs(heads: Sequence[int]) -> list[tuple[int, int]]:
    """`heads` as (first, count) of neighbours."""
    found: list[tuple[int, int]] = []
    for head in heads:
        if found and head == sum(found[-1]):
            found[-1] = (found[-1][0], found[-1][1] + 1)
        else:
            found.append((head, 1))
    return found


class PicksHeads(Behaviour):
    """A norm over all heads that hands on `picked_heads` (of the original) alone."""

    picked_heads: tuple[int, ...]
    picked_width: int

    def forward(self, states: Tensor) -> Tensor:
        return select_heads(super().forward(states), self.picked_heads, -1, self.picked_width)
