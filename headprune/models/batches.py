"""Batches as a caller gives them, and one as a model takes it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from headprune.errors import InvalidInput


def several(batches: Any, name: str = "batches") -> Any:
    """`batches` as they are. Raises InvalidInput where they are one batch by itself, or nothing that can be run over."""
    if isinstance(batches, (Mapping, Tensor, str)):
        raise InvalidInput(f"{name} is one {type(batches).__name__}; expected a list of batches: put it into one.")
    if not isinstance(batches, Iterable) and not hasattr(batches, "__getitem__"):
        raise InvalidInput(f"{name} is {batches!r:.80}; expected a list of batches, a DataLoader or the like.")
    return batches


def by_name(model: nn.Module, batch: Any, instead: str = "loss_fn") -> Any:
    """`model(**batch)`. Raises InvalidInput where `batch` is no mapping; instead: the argument for batches of other kinds."""
    if not isinstance(batch, Mapping):
        raise InvalidInput(f"a batch is a {type(batch).__name__}; expected a dict for model(**batch), or give {instead}.")
    return model(**batch)
