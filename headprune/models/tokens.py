"""Which tokens of a batch count: padded ones belong to no statistic."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from headprune.errors import InvalidInput

TokenMask = Callable[[Any], Tensor | None]


def attention_mask_of(batch: Any) -> Tensor | None:
    """The batch's 2-D "attention_mask", where it has one."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask if mask is not None and mask.dim() == 2 else None


def valid_tokens(states: Tensor, mask: Tensor | None) -> Tensor:
    """bool [batch, tokens] for states [batch, tokens, features]; all of them where there is no mask.

    Raises InvalidInput where the mask is of another shape than the states.
    """
    if mask is None:
        return torch.ones(states.shape[:-1], dtype=torch.bool, device=states.device)
    if mask.shape != states.shape[:-1]:
        raise InvalidInput(
            f"the token mask is {list(mask.shape)} where the model runs {list(states.shape[:-1])} tokens; give a token_mask "
            "that fits what the loss runs."
        )
    return mask.to(states.device).bool()
