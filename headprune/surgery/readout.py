"""What a model gives, as models are compared by it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves

from headprune.errors import InvalidInput
from headprune.models.gating import output_input_hook
from headprune.models.tokens import valid_tokens
from headprune.surgery.parts import Part


def readout(output: Any) -> tuple[Tensor, bool]:
    """The tensor by which outputs are compared, fp32, and whether it holds logits.

    Raises InvalidInput where there is none of more than one dimension.
    """
    logits = getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        return logits.float(), True
    found = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.dim() > 1]
    if not found:
        raise InvalidInput(f"the forward pass gives no tensor to compare models by, but {type(output).__name__}.")
    return found[0].float(), False


def compared(output: Any) -> Tensor:
    """The tensor of `readout`; empty where there is none."""
    try:
        return readout(output)[0]
    except InvalidInput:
        return torch.empty(0)


def states_and_output(run: Callable[[], Any], part: Part) -> tuple[Tensor, Tensor]:
    """What a pass gives the linear layer of `part` at its first call, and the tensor by which outputs are compared, in the dtype of
    the former: two passes agree no better than the model computes.

    Raises InvalidInput where the pass does not reach the part.
    """
    seen: list[Tensor] = []
    with output_input_hook(part, seen.append):
        output = run()
    if not seen:
        raise InvalidInput(f"{part.name} was not reached by the calibration data.")
    return seen[0], compared(output).to(seen[0].dtype)


def distances(dense: Tensor, found: Tensor, is_logits: bool, mask: Tensor | None) -> Tensor:
    """[samples]: of each sample's output [.., features], the mean over its tokens that count."""
    if is_logits:
        errors = F.kl_div(found.log_softmax(-1), dense.log_softmax(-1), log_target=True, reduction="none").sum(dim=-1)
    else:
        errors = (found - dense).square().sum(dim=-1) / dense.square().sum(dim=-1).mean().clamp(min=torch.finfo(dense.dtype).tiny)
    if errors.dim() == 1:
        return errors
    fits = mask is not None and mask.shape == errors.shape
    counted = valid_tokens(found, mask).to(errors) if fits else torch.ones_like(errors)
    return (errors * counted).flatten(1).sum(dim=1) / counted.flatten(1).sum(dim=1).clamp(min=1)
