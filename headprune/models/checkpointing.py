"""Activation checkpointing of a transformers model in eval mode: layers keep their inputs alone and run again backwards.

What a layer holds while it runs again is mostly its feed-forward: three tensors of the inner width, and in its backward pass their
three gradients. It works token by token, so it takes some samples at a time, and the gradients of those alone exist together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from inspect import Parameter, signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from headprune.errors import InvalidInput

PARTS, PART_TOKENS = 4, 1024  # of a feed-forward: at most so many parts, of at least so many tokens
# A layer that runs twice would add its keys to a cache twice.
CACHES = {"past_key_values": None, "past_key_value": None, "layer_past": None, "use_cache": False}


@contextmanager
def checkpointed(model: nn.Module) -> Iterator[nn.Module]:
    """Inside the block every layer that transformers can checkpoint is, in eval mode too (transformers' own switch works in
    training alone, with its dropout); inside another such block it changes nothing. Raises InvalidInput where the model has no
    such layer."""
    layers = outermost(model)
    if any(is_wrapped(layer) for layer in layers):
        yield model
        return
    if not layers:
        raise InvalidInput(
            f"{type(model).__name__} has no layer that transformers can checkpoint; leave checkpointing=True out, or call "
            "torch.utils.checkpoint in the model."
        )
    inner = [module for layer in layers for module in layer.modules() if is_feed_forward(module)]
    own = {module: module.__dict__.get("forward") for module in (*layers, *inner)}
    try:
        for module in inner:
            module.forward = partial(in_parts, module.forward)
        for layer in layers:
            layer.forward = partial(run_twice, layer.forward)
        yield model
    finally:
        for module, forward in own.items():
            if forward is None:
                module.__dict__.pop("forward", None)
            else:
                module.forward = forward


def is_wrapped(layer: nn.Module) -> bool:
    forward = vars(layer).get("forward")
    return isinstance(forward, partial) and forward.func is run_twice


def outermost(model: nn.Module) -> list[nn.Module]:
    found: list[nn.Module] = []
    below: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer) and module not in below:
            found.append(module)
            below |= set(module.modules())
    return found


def is_feed_forward(module: nn.Module) -> bool:
    """A module of two or three linear layers and activations alone, by transformers' names: what it gives for a token depends on
    no other token."""
    children = list(module.children())
    linear = [child for child in children if type(child) is nn.Linear]
    rest = [child for child in children if type(child) is not nn.Linear]
    named = type(module).__name__.endswith(("MLP", "FeedForward"))
    return named and len(linear) in (2, 3) and not any(list(child.parameters()) or list(child.children()) for child in rest)


def in_parts(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`forward(states)` for some samples, or tokens of one sample, at a time; any other call as it is."""
    states = args[0] if len(args) == 1 and not kwargs else None
    if not isinstance(states, Tensor) or states.dim() != 3 or not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    dim = 0 if len(states) > 1 else 1
    parts = states.chunk(min(PARTS, max(1, states.shape[0] * states.shape[1] // PART_TOKENS)), dim)
    return forward(states) if len(parts) == 1 else torch.cat([forward(part) for part in parts], dim)


def run_twice(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`forward(...)`, again in the backward pass; without a graph just once."""
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, use_reentrant=False, **without_cache(forward, args, kwargs))


def without_cache(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a layer's call by name, in the order of its signature, and no cache among them."""
    known = [
        parameter.name for parameter in signature(forward).parameters.values() if parameter.kind is Parameter.POSITIONAL_OR_KEYWORD
    ]
    given = dict(zip(known, args)) | kwargs
    return given | {name: nothing for name, nothing in CACHES.items() if name in given}
