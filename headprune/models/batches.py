"""Batches as a caller gives them, and one as a model takes it."""

from __future__ import annotations

import inspect
import numbers
from collections.abc import Iterable, Mapping
from typing import Any

import numpy
from torch import Tensor, nn
from transformers import PreTrainedModel

from headprune.errors import InvalidInput
from headprune.models.tokens import IGNORED_LABEL


def several(batches: Any, name: str = "batches") -> Any:
    """`batches` as they are. Raises InvalidInput where they are one batch by itself, or nothing that can be run over."""
    if isinstance(batches, (Mapping, Tensor, str)):
        raise InvalidInput(f"{name} is one {type(batches).__name__}; expected a list of batches: put it into one.")
    if not isinstance(batches, Iterable) and not hasattr(batches, "__getitem__"):
        raise InvalidInput(f"{name} is {batches!r:.80}; expected a list of batches, a DataLoader or the like.")
    return batches


def length_of(data: Any) -> int | None:
    """How many batches or rows there are; None where it does not tell: a DataLoader of a stream has a len() that fails."""
    try:
        return len(data)
    except TypeError:
        return None


def by_name(model: nn.Module, batch: Any, instead: str = "loss_fn") -> Any:
    """`model(**batch)`. Raises InvalidInput where `batch` is no mapping, or one that the model's forward does not take; instead:
    the argument for batches of other kinds."""
    if not isinstance(batch, Mapping):
        raise InvalidInput(f"a batch is a {type(batch).__name__}; expected a dict for model(**batch), or give {instead}.")
    if isinstance(model, PreTrainedModel):
        refuse_rows(batch, {model.main_input_name, "input_ids", "attention_mask", "labels"})
    try:
        return model(**batch)
    except TypeError as error:
        if taken(model, batch):
            raise
        names = ", ".join(map(str, batch))
        raise InvalidInput(
            f"{type(model).__name__} does not take a batch of {names} as model(**batch): {error}. Give {instead}, or other batches."
        ) from error


def taken(model: nn.Module, batch: Mapping[str, Any]) -> bool:
    """Whether the signature of the model's forward takes what `batch` holds, by name."""
    try:
        inspect.signature(model.forward).bind(**batch)
    except (TypeError, ValueError):
        return False
    return True


def refuse_rows(batch: Mapping[str, Any], names: Iterable[str]) -> None:
    """InvalidInput where what a batch holds under `names` is no tensor yet, or one row of a data set."""
    way = 'a DataLoader whose collate_fn pads and stacks rows, or the tokenizer with return_tensors="pt", makes batches'
    for name in sorted(names):
        value = first = batch.get(name)
        while isinstance(first, list) and first:
            first = first[0]
        if isinstance(value, numpy.ndarray) or isinstance(first, numbers.Number):
            raise InvalidInput(f"{name} of a batch is a {type(value).__name__}; expected a tensor [batch, ...]: {way}.")
    tokens = batch.get("input_ids")
    if isinstance(tokens, Tensor) and tokens.dim() == 1:
        raise InvalidInput(f"input_ids of a batch has the shape {list(tokens.shape)}; expected [batch, tokens]: {way}.")


def unlabelled(batch: Any) -> bool:
    """Whether a batch has labels of which a loss counts none."""
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    return isinstance(labels, Tensor) and not bool((labels != IGNORED_LABEL).any())


def why_infinite(batch: Any) -> str:
    """What is behind a loss of `batch` that is NaN or infinite."""
    if unlabelled(batch):
        return f"none of its labels counts (all are {IGNORED_LABEL}): leave it out, or give it some"
    return "look for empty labels or overflow in low precision"
