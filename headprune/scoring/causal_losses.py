"""The loss of a language model without a tensor of all logits: the head runs on some tokens at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from headprune.arguments import check_arguments
from headprune.errors import InvalidInput, UnsupportedModel, whole_number
from headprune.models.tokens import IGNORED_LABEL
from headprune.models.trunk import Trunk, leaving, trunk_of

TOKENS = 512  # at a time


def causal_losses(model: nn.Module, batch: Mapping[str, Any], tokens: int = TOKENS) -> Tensor:
    """Mean next-token loss of each sample, [n] fp32: a `loss_fn` for `hp.score` with exact gradients per sample.

    Peak memory beside the layers' own is that of `tokens` rows of logits, where the model's own loss holds all of them, in its
    dtype and in fp32. What the model does behind its last layer (final norm, head, soft cap, scale) is its own code.

    Args:
        batch: "labels" [n, length] beside what the model reads; -100 counts for nothing. They are shifted here, as in transformers.
            A sample without any has the loss 0; where no sample has one, all are NaN, as the model's own loss is.
        tokens: how many tokens of the batch go through the head together.

    Raises InvalidInput where the batch has no labels or the model no head, UnsupportedModel where the layers do not form one stack,
    or hand on several streams (Gemma 3n).
    """
    check_arguments(causal_losses, locals())
    whole_number("tokens", tokens)
    labels = batch.get("labels")
    if labels is None:
        raise InvalidInput("the batch has no labels; a causal loss needs them (the input_ids, with -100 where padded).")
    below = up_to_the_head(model, {name: value for name, value in batch.items() if name != "labels"})
    states = below.states

    def of_part(part: Tensor, targets: Tensor, start: int) -> Tensor:
        logits = below.logits(part, start).flatten(0, 1).float()
        found = functional.cross_entropy(logits, targets.flatten(), ignore_index=IGNORED_LABEL, reduction="none")
        return found.view(targets.shape).sum(dim=1)

    targets = functional.pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL).to(states.device)
    step = max(1, tokens // len(states))
    total = states.new_zeros(len(states), dtype=torch.float32)
    for start in range(0, states.shape[1], step):
        part, wanted = states[:, start : start + step], targets[:, start : start + step]
        total = total + checkpoint(of_part, part, wanted, start, use_reentrant=False, preserve_rng_state=False)
    counted = (targets != IGNORED_LABEL).sum(dim=1)
    return total / torch.where(counted.any(), counted.clamp(min=1), counted)


@dataclass(frozen=True)
class BelowTheHead:
    """A pass of a language model that has come behind its last layer. states: [n, length, hidden]; alone: layers return them
    without a tuple."""

    model: nn.Module
    trunk: Trunk
    inputs: Mapping[str, Any]
    states: Tensor
    alone: bool

    def logits(self, part: Tensor, start: int) -> Tensor:
        """[n, tokens, vocabulary] of `part` of the states, which begins at token `start`. What the model does behind its last layer
        (final norm, head, soft cap, scale) is its own code."""
        inputs = {name: tokens_of(value, self.states, start, part.shape[1]) for name, value in self.inputs.items()}
        with leaving(self.trunk, part, self.alone):
            output = self.model(**inputs)
        logits: Tensor | None = getattr(output, "logits", None)
        if logits is None:
            name = type(self.model).__name__
            raise InvalidInput(f"{name} gives no logits; a causal loss needs a language model with its head.")
        return logits


def up_to_the_head(model: nn.Module, inputs: Mapping[str, Any]) -> BelowTheHead:
    """Raises UnsupportedModel where the layers do not form one stack, or hand on several streams (Gemma 3n)."""
    trunk = trunk_of(model)
    behind: list[Any] = []
    handle = trunk.layers[-1].register_forward_hook(lambda _module, _args, output: behind.append(output))
    try:
        getattr(model, "base_model", model)(**inputs)
    finally:
        handle.remove()
    alone = isinstance(behind[0], Tensor)
    states = behind[0] if alone else behind[0][0]
    if states.dim() != 3:
        raise UnsupportedModel(
            f"the layers of {type(model).__name__} hand on states of {states.dim()} dimensions; expected [samples, tokens, "
            "features]. Take the model's own loss, which holds all logits."
        )
    return BelowTheHead(model, trunk, inputs, states, alone)


def tokens_of(value: Any, states: Tensor, start: int, length: int) -> Any:
    """The part of an input that has a row for each token: some models shape their output after it."""
    by_token = isinstance(value, Tensor) and value.shape[:2] == states.shape[:2]
    return value[:, start : start + length] if by_token else value
