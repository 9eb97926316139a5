"""The batch of each training step, the same after a kill."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from headprune.errors import InvalidInput


def batches_from(data: Any, first: int, steps: int, seed: int) -> Iterator[Any]:
    """The batches of steps `first` up to `steps`, over and over `data`.

    A sequence is read in another order each time, by the seed; other iterables (a DataLoader) in their own. Raises InvalidInput
    where there is none, or where an iterator cannot be read twice.
    """
    if isinstance(data, Sequence):
        if not data:
            raise InvalidInput("the training data is empty; give at least one batch.")
        for step in range(first, steps):
            epoch, position = divmod(step, len(data))
            yield data[order(len(data), seed, epoch)[position]]
        return
    step = 0
    while step < steps:
        before = step
        for batch in data:
            if step >= steps:
                return
            if step >= first:
                yield batch
            step += 1
        if step == before:
            raise InvalidInput(
                f"the training data ran out after {step} of {steps} batches; give a list, or what can be read again."
            )


def order(count: int, seed: int, epoch: int) -> list[int]:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)).tolist()
