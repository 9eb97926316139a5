"""The loss that recovery lowers: the model's own, or what a teacher asks for, or both."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from headprune.arguments import check_arguments
from headprune.errors import InvalidInput
from headprune.models.adapters import attention_sites
from headprune.models.tokens import TokenMask, token_masks
from headprune.nn.given import plain_module
from headprune.recovery.distillation import Comparison, Distillation, distillation_loss, valid_of, wanted_features
from headprune.recovery.features import catching
from headprune.recovery.logits import logits_of, problem_type
from headprune.recovery.shared_weights import shared_weights
from headprune.recovery.stored_logits import StoredLogits
from headprune.recovery.teacher import ModelTeacher, check_outputs, run
from headprune.scoring.observer import LossFunction


class Objective:
    """`objective(model, batch)` is the loss, a scalar with a graph. Make it before adapters are attached.

    model: the student, or what a library has wrapped around it (DDP). The arguments are those of `recover`.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        loss_fn: LossFunction | None = None,
        teacher: nn.Module | str | Path | None = None,
        distil: Distillation | None = None,
        token_mask: TokenMask | None = None,
    ) -> None:
        check_arguments(Objective.__init__, locals())
        if distil is not None and teacher is None:
            raise InvalidInput("distil is given without a teacher; give teacher=the dense model, or a folder of stored logits.")
        self.model, self.loss_fn, self.distil = model, loss_fn, distil
        self.source, self.token_mask = plain_module(teacher) if isinstance(teacher, nn.Module) else teacher, token_mask
        if self.source is model:
            raise InvalidInput("the teacher is the model itself; give the dense model, a copy.deepcopy from before hp.prune.")
        self.teacher: Any = None
        self.checked = False

    @contextmanager
    def ready(self, device: torch.device, batch: Any = None, shards: bool = False) -> Iterator[None]:
        """Inside the block the teacher stands ready on `device`. batch: decides what is distilled where that was not said.
        shards: each rank holds a part of a teacher at hand."""
        if self.source is None:
            yield
            return
        self.distil = self.distil or default_distillation(self.model, batch, self.loss_fn)
        needs_sites = {"hidden", "attention", "relations", "logits", "embedding", "similarity", *self.distil.more}
        self.sites = attention_sites(self.model) if needs_sites & set(self.distil.weights) else ()
        self.wanted = wanted_features(self.distil, self.sites)
        self.masks = [token_masks(self.model, self.token_mask, logits=of_logits) for of_logits in (False, True)]
        if isinstance(self.source, nn.Module):
            self.teacher = ModelTeacher(self.source, self.wanted, self.loss_fn, shards)
        else:
            self.teacher = StoredLogits(self.source, self.distil)
        self.teacher.check(self.model)
        with self.teacher.teaching(device):
            yield

    def sharing(self) -> AbstractContextManager[Any]:
        """In it a teacher at hand and the frozen part of the student are one copy."""
        return shared_weights(self.model, self.source) if isinstance(self.source, nn.Module) else nullcontext()

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        if self.teacher is None:
            return own_loss(model, run(model, batch, self.loss_fn), self.loss_fn)
        with catching(self.model, self.sites, self.wanted) as student:
            returned = run(model, batch, self.loss_fn)
        teacher, distil = self.teacher.features(batch), self.distil
        assert distil is not None  # decided where the teacher was made ready
        if not self.checked:
            check_outputs(student, teacher, distil.weights)
            self.checked = True
        valid, valid_logits = (valid_of(mask, batch) for mask in self.masks)
        problem = problem_type(self.source) or problem_type(self.model)
        comparison = Comparison(student, teacher, tuple(self.sites), batch, distil, valid, valid_logits, problem)
        total = distillation_loss(comparison)
        if distil.task:
            total = total + distil.task * own_loss(model, returned, self.loss_fn)
        return total


def own_loss(model: nn.Module, returned: Any, loss_fn: LossFunction | None) -> Tensor:
    """The loss of a pass, from what `run` gave: a scalar."""
    found = returned if loss_fn is not None else getattr(returned, "loss", None)
    if found is None:
        raise InvalidInput(f"{type(model).__name__} returned no loss: put labels into the batches, or give loss_fn or a teacher.")
    mean: Tensor = found.mean()
    return mean


@torch.no_grad()
def default_distillation(model: nn.Module, batch: Any, loss_fn: LossFunction | None) -> Distillation:
    """The logits where the model has some, else the embedding and the hidden states of an encoder."""
    with catching(model, (), {}) as found:
        run(model, batch, loss_fn)
    output = found.outputs[0] if found.outputs else None
    if hasattr(output, "last_hidden_state") and not hasattr(output, "logits"):
        return Distillation(embedding=1.0, hidden=1.0)
    logits_of(output)
    return Distillation(logits=1.0)


def loss(
    model: nn.Module,
    batch: Any,
    teacher: nn.Module | str | Path,
    distil: Distillation | None = None,
    *,
    loss_fn: LossFunction | None = None,
    token_mask: Callable[[Any], Tensor | None] | None = None,
) -> Tensor:
    """The distillation loss of one batch, a scalar with a graph, for a training loop of your own.

    model: the pruned model, in the mode you train it in. batch: a dict for `model(**batch)`, or what loss_fn(model, batch)
    understands. teacher: the dense model (left frozen by this call), or a folder that `store_logits` wrote. distil: default
    the logits, or of an encoder the embedding and the hidden states.

    Raises InvalidInput where the teacher does not fit the model.
    """
    objective = Objective(model, loss_fn=loss_fn, teacher=teacher, distil=distil, token_mask=token_mask)
    with objective.ready(next(model.parameters()).device, batch):
        return objective(model, batch)
