"""Which sample each picture belongs to, where a batch of text has more or fewer pictures than samples, and each token of packed
pictures: the vision towers of Qwen-VL and its relatives take the patches of all pictures of a batch as one sequence [tokens,
features]. Pictures come in the order of the samples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from headprune.errors import InvalidInput
from headprune.models.tokens import model_around, reads_tokens

GRIDS = ("image_grid_thw", "video_grid_thw", "grid_thw")  # [pictures, 3]: frames, rows and columns of patches
PLACES = ("image_token_id", "image_token_index", "video_token_id")  # of a config: the ids whose embeddings become pictures


def is_packed(states: Tensor) -> bool:
    return states.dim() == 2


def sample_lengths(model: nn.Module, site: str, batch: Any, tokens: int, samples: int | None = None) -> list[int]:
    """How many of the `tokens` that an attention `site` of `model` runs belong to each sample of `batch`; they sum to `tokens`.

    samples: how many there are, where that is known. Raises InvalidInput where the batch does not tell.
    """
    samples = samples or count_samples(batch)
    if samples == 1:
        return [tokens]
    shares = shares_of(model, batch)
    lengths = None if shares is None or len(shares) != samples else allotted(shares, tokens)
    if lengths is None:
        raise InvalidInput(
            f"{site} runs {tokens} tokens of all pictures of a batch at once, and {samples or 'the'} samples do not tell which are "
            "theirs: expected input_ids with the model's placeholders of pictures (or of videos, not both), or one picture a "
            "sample. Give batches of one sample."
        )
    return lengths


def picture_lengths(model: nn.Module, site: str, batch: Any, rows: int, samples: int) -> list[int] | None:
    """How many of the `rows` (pictures, tiles or windows of them) that an attention `site` runs as its batch belong to each sample;
    None where it reads no pictures or the placeholders in `batch` do not tell."""
    if reads_tokens(model_around(model, site)):
        return None
    shares = shares_of(model, batch)
    return None if shares is None or len(shares) != samples else allotted(shares, rows)


def allotted(shares: Tensor, units: int) -> list[int] | None:
    """`units` in proportion to `shares`; None unless as many of the one always make one of the other."""
    total = int(shares.sum())
    if not total or not units or (units % total and total % units):
        return None
    lengths = [int(share) * units for share in shares]
    return None if any(length % total for length in lengths) else [length // total for length in lengths]


def count_samples(batch: Any) -> int | None:
    found = [batch.get(name) for name in ("input_ids", *GRIDS)] if isinstance(batch, Mapping) else []
    return next((len(value) for value in found if isinstance(value, Tensor)), None)


def shares_of(model: nn.Module, batch: Any) -> Tensor | None:
    """int64 [samples]: what part of the pictures each sample has: its placeholders, else the size of its one picture."""
    if not isinstance(batch, Mapping):
        return None
    grids = [batch[name] for name in GRIDS if isinstance(batch.get(name), Tensor)]
    if len(grids) > 1:
        return None
    ids, config = batch.get("input_ids"), getattr(model, "config", None)
    places = [getattr(config, name) for name in PLACES if isinstance(getattr(config, name, None), int)]
    if isinstance(ids, Tensor) and places:
        return torch.isin(ids, torch.tensor(places, device=ids.device)).sum(dim=1)
    return grids[0].prod(dim=1) if grids and not isinstance(ids, Tensor) else None
