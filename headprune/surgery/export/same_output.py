"""The check of every export: the same numbers as before, on a small input, in fp32 whatever the dtype of the model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from headprune.errors import HeadpruneError, UnsupportedModel
from headprune.models.tiny_inputs import tiny_inputs, without_padding
from headprune.models.uncompiled import uncompiled
from headprune.surgery.stand_in import widened

log = logging.getLogger("headprune")
TOLERANCE = 1e-4  # relative to the largest value; 32 steps of the coarser dtype where one of the outputs is not of fp32
Narrow = tuple[dict[str, Any], str, Tensor]  # a module's own parameters or buffers, and what stood there under which name


@torch.no_grad()
def small_output(model: nn.Module) -> Tensor:
    """The model's first output on `tiny_inputs`, padded rows set to 0; of fp32, unless the model runs in its own dtype alone.
    Raises HeadpruneError where it takes no such input, or does not run on it."""
    inputs = tiny_inputs(model)
    if inputs is None:
        raise HeadpruneError(f"{type(model).__name__} does not tell what input it takes, so the export cannot be checked.")
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        output = in_own_dtype_at_worst(model, inputs)
    finally:
        for module, was in training.items():
            module.training = was
    return without_padding(output, inputs)


def in_own_dtype_at_worst(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """The first output in fp32, or where that fails as the model is. Raises UnsupportedModel where that fails too."""
    try:
        with in_fp32(model):
            output: Tensor = model(**inputs)[0]
    except Exception as error:  # whatever a model raises that runs in its own dtype alone
        failure = error
    else:
        return output
    try:
        output = model(**inputs)[0]
    except Exception as error:  # whatever a model raises on an input that it was not made for
        raise UnsupportedModel(
            f"{type(model).__name__} does not run on the small input that an export is checked by: {error}"
        ) from error
    log.warning("%s does not run in fp32; its outputs are compared as they are: %s", type(model).__name__, failure)
    return output


def same_output(expected: Tensor, found: Tensor, what: str) -> str:
    """A line that says how equal both are; HeadpruneError where they are not."""
    step = max(torch.finfo(output.dtype).eps for output in (expected, found))
    expected, found = widened(expected), widened(found.to(expected.device))
    scale = expected.abs().max().clamp(min=1e-6)
    error = float((found - expected).abs().max() / scale)
    if not error <= max(TOLERANCE, 32 * step):
        raise HeadpruneError(f"{what} gives other outputs than the model ({error:.1e} of the largest); nothing was written.")
    return f"{what} = the model, to {error:.1e} of the largest output"


@contextmanager
def in_fp32(model: nn.Module) -> Iterator[None]:
    """Inside the block half-precision weights are of fp32 while they are used: those of one layer at a time, so that there is no
    second copy of the model."""
    with uncompiled(model), ExitStack() as stack:
        for unit, inside in units(model):
            narrow: list[Narrow] = []
            stack.callback(restore, narrow)
            stack.callback(unit.register_forward_pre_hook(entering(inside, narrow), with_kwargs=True).remove)
            stack.callback(unit.register_forward_hook(lambda *_, narrow=narrow: restore(narrow), always_call=True).remove)
        yield


def units(model: nn.Module) -> list[tuple[nn.Module, list[nn.Module]]]:
    """What runs as one: each member of a stack of layers with all that is in it, and every other module by itself. A layer may ask
    a part of it for its dtype before it calls it."""
    stacked = [member for module in model.modules() if isinstance(module, nn.ModuleList) for member in module]
    inner = {module for member in stacked for module in member.modules() if module is not member}
    layers = [member for member in dict.fromkeys(stacked) if member not in inner]
    others = [module for module in model.modules() if module not in inner and module not in layers]
    return [(layer, list(layer.modules())) for layer in layers] + [(module, [module]) for module in others]


def entering(inside: list[nn.Module], narrow: list[Narrow]) -> Callable[..., Any]:
    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        stores: list[dict[str, Any]] = [tensors for module in inside for tensors in (module._parameters, module._buffers)]
        for tensors in stores:
            for name, tensor in tensors.items():
                wide = tensor if tensor is None else widened(tensor)
                if tensor is not None and wide is not tensor:
                    narrow.append((tensors, name, tensor))
                    tensors[name] = wide
        widen: Callable[[Any], Any] = lambda value: widened(value) if isinstance(value, Tensor) else value  # noqa: E731
        return tree_map(widen, args), tree_map(widen, kwargs)

    return hook


def restore(narrow: list[Narrow]) -> None:
    for tensors, name, tensor in narrow:
        tensors[name] = tensor
    narrow.clear()
