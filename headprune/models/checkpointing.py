"""Activation checkpointing of a transformers model in eval mode: layers keep their inputs alone and run again backwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from inspect import Parameter, signature
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from headprune.errors import InvalidInput

# A layer that runs twice would add its keys to a cache twice.
CACHES = {"past_key_values": None, "past_key_value": None, "layer_past": None, "use_cache": False}


@contextmanager
def checkpointed(model: nn.Module) -> Iterator[nn.Module]:
    """Inside the block every layer that transformers can checkpoint is, in eval mode too (transformers' own switch works in
    training alone, with its dropout). Raises InvalidInput where the model has no such layer."""
    layers = outermost(model)
    if not layers:
        raise InvalidInput(
            f"{type(model).__name__} has no layer that transformers can checkpoint; leave checkpointing=True out, or call "
            "torch.utils.checkpoint in the model."
        )
    own = {layer: layer.__dict__.get("forward") for layer in layers}
    try:
        for layer in layers:
            layer.forward = partial(run_twice, layer.forward)
        yield model
    finally:
        for layer, forward in own.items():
            if forward is None:
                layer.__dict__.pop("forward", None)
            else:
                layer.forward = forward


def outermost(model: nn.Module) -> list[nn.Module]:
    found: list[nn.Module] = []
    below: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer) and module not in below:
            found.append(module)
            below |= set(module.modules())
    return found


def run_twice(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`forward(...)`, again in the backward pass; without a graph just once."""
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, use_reentrant=False, preserve_rng_state=False, **without_cache(forward, args, kwargs))


def without_cache(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a layer's call by name, in the order of its signature, and no cache among them."""
    known = [
        parameter.name for parameter in signature(forward).parameters.values() if parameter.kind is Parameter.POSITIONAL_OR_KEYWORD
    ]
    given = dict(zip(known, args)) | kwargs
    return given | {name: nothing for name, nothing in CACHES.items() if name in given}
