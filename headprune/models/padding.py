"""Padding behind the samples of a batch: how long each sample is, and the batch without places that nobody reads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from headprune.models.tokens import SiteTokenMask, plane

CLOSE = {torch.float32: 1e-4, torch.float64: 1e-4}  # root mean square, of the values; kernels round differently by shape
CLOSE_IN_LOW_PRECISION = 2e-2


def lengths_of(batch: Any) -> Tensor | None:
    """[samples] of a batch of tensors [samples] and [samples, tokens] whose attention_mask says that padding is at the end; None of
    any other."""
    mask = plane(batch, "attention_mask") if isinstance(batch, Mapping) else None
    if mask is None or not mask.numel() or not all(can_be_cut(value, mask) for value in batch.values()):
        return None
    lengths = mask.bool().sum(dim=1)
    at_the_end = torch.equal(mask.bool(), torch.arange(mask.shape[1], device=mask.device) < lengths[:, None])
    return lengths.clamp(min=1).cpu() if at_the_end else None


def can_be_cut(value: Any, mask: Tensor) -> bool:
    """Whether `value` has an entry for each sample; numbers that only happen to be as many as the tokens, as targets may, are
    floating."""
    if not isinstance(value, Tensor) or value.dim() not in (1, 2) or len(value) != len(mask):
        return False
    return value is mask or value.shape != mask.shape or not value.is_floating_point()


def part_of(batch: Any, width: int, rows: Tensor | None = None) -> Any:
    """The first `width` tokens of a batch that has `lengths_of`, of `rows` alone where they are given."""
    tokens = batch["attention_mask"].shape[1]
    values = {}
    for name, value in batch.items():
        chosen = value if rows is None else value[rows.to(value.device)]
        values[name] = chosen[:, :width].contiguous() if chosen.dim() == 2 and chosen.shape[1] == tokens else chosen
    return as_given(batch, values)


def as_given(batch: Any, values: dict[str, Tensor]) -> Any:
    """`values` as a mapping of the type of `batch`: a tokenizer's has its items as attributes too."""
    try:
        return type(batch)(values)
    except TypeError:
        return values


def complete(batch: Any, parts: Sequence[Any], sites: Iterable[str], masks: SiteTokenMask) -> bool:
    """Whether all tokens of `batch` that count at `sites` are in the `parts` of it; without a mask padding counts too."""
    for site in sites:
        mask, found = masks(site, batch), [masks(site, part) for part in parts]
        if mask is None or int(mask.bool().sum()) != sum(0 if one is None else int(one.bool().sum()) for one in found):
            return False
    return True


def close(expected: Tensor, found: Tensor) -> bool:
    """Whether the two are equal up to how kernels round for other shapes."""
    if expected.shape != found.shape:
        return False
    error = (expected.float() - found.float()).square().mean().sqrt()
    return bool(error <= CLOSE.get(expected.dtype, CLOSE_IN_LOW_PRECISION) * expected.float().square().mean().sqrt())
