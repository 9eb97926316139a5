"""How good a model is, to a schedule: one number, higher is better, and the loss that stands for it where none is given."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from headprune.errors import InvalidInput
from headprune.models.batches import why_infinite
from headprune.scoring.observer import LossFunction
from headprune.scoring.passes import in_eval_mode

LABELS = {"labels", "start_positions"}


def batch_loss(model: nn.Module, batch: Any, loss_fn: LossFunction | None) -> Tensor:
    """The mean loss of a batch: of `loss_fn(model, batch)`, else the model's own. A scalar, differentiable.

    Raises InvalidInput where there is none.
    """
    if loss_fn is not None:
        return loss_fn(model, batch).mean()
    loss = getattr(model(**batch), "loss", None) if isinstance(batch, Mapping) else None
    if loss is None:
        raise InvalidInput(f"{type(model).__name__} returned no loss: put labels into the batches, or give loss_fn.")
    mean: Tensor = loss.mean()
    return mean


def has_loss(batches: Sequence[Any], loss_fn: LossFunction | None) -> bool:
    return bool(batches) and (loss_fn is not None or (isinstance(batches[0], Mapping) and bool(LABELS & set(batches[0]))))


@torch.no_grad()
def mean_loss(model: nn.Module, batches: Iterable[Any], loss_fn: LossFunction | None) -> float:
    """Of all batches alike, in eval mode. Raises InvalidInput where one's is not finite."""
    losses = []
    with in_eval_mode(model):
        for batch in batches:
            losses.append(float(batch_loss(model, batch, loss_fn)))
            if not math.isfinite(losses[-1]):
                raise InvalidInput(f"the loss is NaN or infinite on a batch; {why_infinite(batch)}.")
    return sum(losses) / len(losses)


def drop(before: float, now: float) -> float:
    """The share of the quality `before` that is lost: 0.02 where 0.50 has become 0.49, or a perplexity of 10.0 10.2."""
    return (before - now) / max(abs(before), 1e-12)


def refuse_not_finite(quality: float | None) -> None:
    if quality is not None and not math.isfinite(quality):
        raise InvalidInput(f"the quality is {quality}: the metric or the loss is NaN or infinite.")
