"""Per-sample losses of models that return only their batch's mean (transformers)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headprune.errors import InvalidInput
from headprune.models.batches import by_name, why_infinite
from headprune.models.tokens import IGNORED_LABEL

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}  # of a loss computed in another order; others: LOW_PRECISION
LOW_PRECISION = 5e-2
SAME_LOGITS = {torch.float64: 1e-9, torch.float32: 1e-5}  # of the mean loss of the same logits, by the loss's own precision
SAME_LOGITS_LOW_PRECISION = 1e-2

Rows = tuple[Tensor, Tensor]  # each sample's loss [n], the labels that it is the mean of [n]


class OwnLoss:
    """A loss_fn for dict batches of a transformers model: the per-sample form of the loss that the model itself returns.

    Which loss that is (next token, token, class, several classes, regression, answer span) is recognised by value: its mean
    over the batch, weighted by the number of labels, is the model's. A sample's loss is the mean over its own labels.
    Raises InvalidInput where there is no loss, where none fits, and where a sample has no label at all.
    """

    def __init__(self) -> None:
        self._form: str | None = None

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        output = by_name(model, batch)
        loss = getattr(output, "loss", None)
        if loss is not None:
            self._form = recognised(output, batch, loss, type(model).__name__, self._form)
        elif self._form is None or not (set(batch) & {"labels", "start_positions"}):
            raise InvalidInput(f"{type(model).__name__} returned no loss: put labels into the batches, or give loss_fn.")
        found = FORMS[self._form](output, batch)
        if found is None:
            raise InvalidInput(f"a batch has no labels as those before it had ({self._form}); give loss_fn.")
        losses, counts = found
        if not counts.all():
            raise InvalidInput(f"samples {(counts == 0).nonzero().flatten().tolist()} of a batch have no label that counts.")
        return losses


def recognised(output: Any, batch: Mapping[str, Any], loss: Tensor, model: str, known: str | None) -> str:
    """The name of the form whose weighted mean is `loss`: `known` where that still fits, else the one that comes nearest."""
    expected = float(loss.detach())
    allowed = SAME_LOGITS.get(loss.dtype, SAME_LOGITS_LOW_PRECISION) * (1 + abs(expected))
    if not math.isfinite(expected):
        raise InvalidInput(f"the loss of {model} is NaN or infinite on a batch; {why_infinite(batch)}.")
    distances: dict[str, float] = {}
    for name, form in FORMS.items():
        found = form(output, batch)
        if found is not None and found[1].any():
            losses, counts = (part.detach().double() for part in found)
            distances[name] = abs(float((losses * counts).nansum() / counts.sum()) - expected)
    fits = known is not None and distances.get(known, math.inf) <= allowed
    nearest = known if fits else min(distances, key=distances.__getitem__, default=None)
    if nearest is None or not distances[nearest] <= allowed:
        raise InvalidInput(
            f"the loss of {model} ({expected:.4g} on a batch) is none that headprune knows sample by sample "
            f"({', '.join(FORMS)}); give loss_fn(model, batch) -> per-sample losses [n]."
        )
    return nearest


def close(found: Tensor, expected: Tensor, model: nn.Module) -> bool:
    """Whether both are the same losses but for rounding in the model's precision."""
    allowed = tolerance_of(model) * (1 + expected.abs())
    return found.shape == expected.shape and bool(((found - expected).abs() <= allowed).all())


def tolerance_of(model: nn.Module) -> float:
    """The relative error that another order of summation may make in the model's precision."""
    return TOLERANCE.get(next((parameter.dtype for parameter in model.parameters()), torch.float32), LOW_PRECISION)


def next_token(output: Any, batch: Mapping[str, Any]) -> Rows | None:
    found = logits_and_labels(output, batch)
    if found is None:
        return None
    logits, labels = found
    if labels.shape != logits.shape[:-1] or labels.dim() != 2 or labels.shape[1] < 2:
        return None
    return cross_entropy(logits[:, :-1], labels[:, 1:])


def token(output: Any, batch: Mapping[str, Any]) -> Rows | None:
    found = logits_and_labels(output, batch)
    if found is None:
        return None
    logits, labels = found
    if labels.shape != logits.shape[:-1] or labels.dim() != 2:
        return None
    return cross_entropy(logits, labels)


def one_class(output: Any, batch: Mapping[str, Any]) -> Rows | None:
    found = logits_and_labels(output, batch)
    if found is None:
        return None
    logits, labels = found
    if logits.dim() != 2 or labels.numel() != len(logits):
        return None
    return cross_entropy(logits[:, None], labels.view(-1, 1))


def several_classes(output: Any, batch: Mapping[str, Any]) -> Rows | None:
    found = logits_and_labels(output, batch, whole=False)
    if found is None:
        return None
    logits, labels = found
    if labels.shape != logits.shape:
        return None
    losses = F.binary_cross_entropy_with_logits(logits, labels.to(logits), reduction="none").flatten(1).mean(dim=1)
    return losses, torch.ones_like(losses)


def regression(output: Any, batch: Mapping[str, Any]) -> Rows | None:
    found = logits_and_labels(output, batch, whole=False)
    if found is None:
        return None
    logits, labels = found
    if labels.numel() != logits.numel() or len(labels) != len(logits):
        return None
    losses = (logits.flatten(1) - labels.reshape(len(labels), -1).to(logits)).square().mean(dim=1)
    return losses, torch.ones_like(losses)


def answer_span(output: Any, batch: Mapping[str, Any]) -> Rows | None:
    if not all(hasattr(output, name) for name in ("start_logits", "end_logits")) or "end_positions" not in batch:
        return None
    parts = []
    for name in ("start", "end"):
        logits = getattr(output, f"{name}_logits").float()
        positions = batch[f"{name}_positions"].view(-1).to(logits.device)
        if positions.shape != logits.shape[:1] or bool((positions >= logits.shape[1]).any()):
            return None  # answers outside of the text count for one of the two alone, which no sample's mean can show
        parts.append(F.cross_entropy(logits, positions, reduction="none"))
    losses = (parts[0] + parts[1]) / 2
    return losses, torch.ones_like(losses)


FORMS: dict[str, Callable[[Any, Mapping[str, Any]], Rows | None]] = {
    "next_token": next_token,
    "token": token,
    "one_class": one_class,
    "several_classes": several_classes,
    "regression": regression,
    "answer_span": answer_span,
}


def logits_and_labels(output: Any, batch: Mapping[str, Any], whole: bool = True) -> tuple[Tensor, Tensor] | None:
    """fp32 logits and labels on their device; nothing where one is missing, or labels are no whole numbers though `whole`."""
    logits, labels = getattr(output, "logits", None), batch.get("labels")
    if not isinstance(logits, Tensor) or not isinstance(labels, Tensor) or (whole and labels.is_floating_point()):
        return None
    return (logits if logits.dtype == torch.float64 else logits.float()), labels.to(logits.device)


def cross_entropy(logits: Tensor, labels: Tensor) -> Rows | None:
    """logits [n, tokens, classes], labels [n, tokens]; nothing where a label is no class."""
    counted = labels != IGNORED_LABEL
    if bool(((labels >= logits.shape[-1]) | (labels < 0) & counted).any()):
        return None
    losses = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED_LABEL, reduction="none")
    counts = counted.sum(dim=1)
    return losses.sum(dim=1) / counts, counts.to(losses)
