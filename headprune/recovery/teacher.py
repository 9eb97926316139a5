"""The dense model that a pruned one learns from: by reference, frozen, in eval mode."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from headprune.errors import InvalidInput
from headprune.models.adapters import attention_sites
from headprune.models.batches import by_name
from headprune.nn.replace import own_attention
from headprune.recovery.features import Features, catching
from headprune.recovery.logits import logits_of
from headprune.recovery.sharding import sharded
from headprune.scoring.observer import LossFunction
from headprune.scoring.passes import pass_of

OF_OUTPUTS = {"logits", "embedding", "similarity"}  # terms


class ModelTeacher:
    """A model beside the student. wanted: as in `catching`. shards: over the ranks."""

    def __init__(
        self, model: nn.Module, wanted: Mapping[str, Iterable[str]], loss_fn: LossFunction | None = None, shards: bool = False
    ) -> None:
        self.model, self.wanted, self.loss_fn, self.shards = model, wanted, loss_fn, shards

    @torch.no_grad()
    def features(self, batch: Any) -> Features:
        with catching(self.model, self.sites, self.wanted) as found:
            run(self.model, batch, self.loss_fn)
        return found

    def check(self, student: nn.Module) -> None:
        check_vocabulary(student, self.model)
        with own_attention(self.model):
            known = {site.name for site in attention_sites(self.model, quantised=True)} if any(self.wanted.values()) else set()
        for names in self.wanted.values():
            for name in names:
                if name not in known:
                    raise InvalidInput(
                        f"the teacher {type(self.model).__name__} has no attention {name}; expected the unpruned model. Of another "
                        "model only logits, embedding and similarity can be learnt."
                    )

    @contextmanager
    def teaching(self, device: torch.device) -> Iterator[None]:
        """Inside the block the teacher is frozen, in eval mode, on `device`; then as it was."""
        model = self.model
        place = next(model.parameters()).device
        with ExitStack() as stack:
            stack.enter_context(own_attention(model))
            if place != device and not self.shards:
                model.to(device)
                stack.callback(model.to, place)
            self.sites = attention_sites(model, quantised=True) if any(self.wanted.values()) else ()
            stack.enter_context(pass_of(model))
            if self.shards:
                stack.enter_context(sharded(model, device))
            yield


def run(model: nn.Module, batch: Any, loss_fn: LossFunction | None) -> Any:
    """One forward pass: what loss_fn gives, else what the model returns."""
    if loss_fn is not None:
        return loss_fn(model, batch)
    return by_name(model, batch)


def check_vocabulary(student: nn.Module, teacher: nn.Module) -> None:
    """InvalidInput where the two read other tokens or name other classes."""
    mine, theirs = (getattr(model, "config", None) for model in (student, teacher))
    if mine is None or theirs is None:
        return
    for name, what in (("vocab_size", "vocabulary"), ("num_labels", "number of classes"), ("id2label", "task head")):
        own, other = getattr(mine, name, None), getattr(theirs, name, None)
        if own is not None and other is not None and own != other:
            raise InvalidInput(
                f"the teacher has another {what} than the student: {name} is {other} there and {own} here. Give the dense model "
                "that the student was cut from."
            )


def check_outputs(student: Features, teacher: Features, terms: Iterable[str]) -> None:
    """InvalidInput where the two models' outputs cannot be compared."""
    if not student.outputs and OF_OUTPUTS & set(terms):
        raise InvalidInput(
            "loss_fn does not call the model itself, so that there are no outputs to compare; call model(...) in it."
        )
    if len(student.outputs) != len(teacher.outputs):
        raise InvalidInput(f"the loss calls the student {len(student.outputs)} times, the teacher {len(teacher.outputs)} times.")
    if "logits" not in terms:
        return
    for mine, theirs in zip(student.outputs, teacher.outputs):
        own = logits_of(mine).shape[-1]
        try:
            other = theirs.classes if hasattr(theirs, "classes") else logits_of(theirs).shape[-1]
        except InvalidInput:
            raise InvalidInput(
                f"the teacher has no logits (it returns a {type(theirs).__name__}), the student has: it lacks the task head. Give "
                "a teacher with that head, or distil hidden states."
            ) from None
        if own != other:
            raise InvalidInput(
                f"the teacher has {other} classes or tokens, the student {own}; give the dense model it was cut from."
            )
