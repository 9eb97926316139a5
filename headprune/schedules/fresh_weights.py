"""New random weights for a model that is already there: the control of the lottery ticket hypothesis."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import nn
from transformers import PreTrainedModel

from headprune.errors import InvalidInput

Initialise = Callable[[nn.Module], None]
DRAWN = "_is_hf_initialized"  # transformers leaves alone what has this


@torch.no_grad()
def with_fresh_weights(model: nn.Module, seed: int, initialise: Initialise | None = None) -> nn.Module:
    """A copy of `model` whose weights are drawn anew, as its class draws them.

    initialise: `initialise(model)` draws them in place; default transformers' own `init_weights`, elsewhere `reset_parameters` of
    every module. Raises InvalidInput where a parameter belongs to a module that has no such method.
    """
    new = copy.deepcopy(model)
    devices = sorted({parameter.device.index or 0 for parameter in new.parameters() if parameter.device.type == "cuda"})
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        if initialise is not None:
            initialise(new)
        elif isinstance(new, PreTrainedModel):
            by_transformers(new)
        else:
            by_module(new)
    return new


def by_transformers(model: PreTrainedModel) -> None:
    for module in model.modules():
        for owner in (module, *module.parameters(recurse=False), *module.buffers(recurse=False)):
            owner.__dict__.pop(DRAWN, None)
    model.init_weights()


def by_module(model: nn.Module) -> None:
    for name, module in reversed(list(model.named_modules())):  # parts first, as they are made before what holds them
        reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
        if reset is not None:
            reset()
        elif any(True for _ in module.parameters(recurse=False)):
            raise InvalidInput(
                f"{name or 'the model'} ({type(module).__name__}) does not say how its weights are drawn; give initialise=."
            )
