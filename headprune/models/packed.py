"""Which sample each token of packed pictures belongs to. The vision towers of Qwen-VL and its relatives take the patches of all
pictures of a batch as one sequence [tokens, features], in the order of the samples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from headprune.errors import InvalidInput

GRIDS = ("image_grid_thw", "video_grid_thw", "grid_thw")  # [pictures, 3]: frames, rows and columns of patches
PLACES = ("image_token_id", "video_token_id")  # of a config: the ids whose embeddings become pictures


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
    if shares is None or len(shares) != samples or not int(shares.sum()) or tokens % int(shares.sum()):
        raise InvalidInput(
            f"{site} runs {tokens} tokens of all pictures of a batch at once, and {samples or 'the'} samples do not tell which are "
            "theirs: expected input_ids with the model's placeholders of pictures (or of videos, not both), or one picture a "
            "sample. Give batches of one sample."
        )
    return [int(share) * (tokens // int(shares.sum())) for share in shares]


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
