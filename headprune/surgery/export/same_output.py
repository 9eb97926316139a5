"""The check of every export: the same numbers as before, on a small input."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from headprune.errors import HeadpruneError
from headprune.models.tiny_inputs import tiny_inputs

TOLERANCE = 1e-4  # relative to the largest value; 32 steps of the dtype where that is more


@torch.no_grad()
def small_output(model: nn.Module) -> Tensor:
    """The model's first output on `tiny_inputs`, padded rows set to 0. Raises HeadpruneError where it takes no such input."""
    inputs = tiny_inputs(model)
    if inputs is None:
        raise HeadpruneError(f"{type(model).__name__} does not tell what input it takes, so the export cannot be checked.")
    training = model.training
    output: Tensor = model.eval()(**inputs)[0]
    model.train(training)
    mask = inputs.get("attention_mask")
    if mask is not None and output.shape[:2] == mask.shape:
        output = output * mask[..., None].to(output.dtype)
    return output


def same_output(expected: Tensor, found: Tensor, what: str) -> str:
    """A line that says how equal both are; HeadpruneError where they are not."""
    found = found.to(expected.device)
    scale = expected.abs().max().clamp(min=1e-6)
    error = float((found - expected).abs().max() / scale)
    if not error <= max(TOLERANCE, 32 * torch.finfo(expected.dtype).eps):
        raise HeadpruneError(f"{what} gives other outputs than the model ({error:.1e} of the largest); nothing was written.")
    return f"{what} = the model, to {error:.1e} of the largest output"
