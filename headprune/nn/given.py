"""A model as a caller gives it: perhaps wrapped by torch.compile, perhaps under torch.inference_mode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from headprune.errors import InvalidInput

SHARDED = {"FSDPModule", "FullyShardedDataParallel"}  # by name: torch imports them when they are asked for


def plain_module(model: Any) -> nn.Module:
    """`model` itself, without the wrapper that torch.compile(model) puts around it, whose names and class are others.

    The wrapper goes on working: it compiles again where the shapes of the weights have changed. InvalidInput where `model` is no
    module.
    """
    if not isinstance(model, nn.Module):
        hint = "hp.load(folder) gives one" if isinstance(model, (str, bytes)) or hasattr(model, "__fspath__") else "give the model"
        raise InvalidInput(f"model is {model!r:.80}; expected a torch.nn.Module: {hint}.")
    inside = model._modules.get("_orig_mod") if type(model).__name__ == "OptimizedModule" else None
    return model if inside is None else inside


def refuse_wrapped(model: nn.Module) -> None:
    """InvalidInput where `model` is wrapped for several ranks by DistributedDataParallel, which holds the weights as they were and
    would go on adding up the gradients of those, or sharded over them."""
    if isinstance(model, DistributedDataParallel):
        raise InvalidInput("model is wrapped in DistributedDataParallel; give model.module, and wrap it again to train on.")
    refuse_sharded(model)


def refuse_sharded(model: nn.Module) -> None:
    """InvalidInput where a part of `model` is sharded by FSDP, which between two passes may show whole weights and keeps others."""
    for name, module in model.named_modules():
        if SHARDED & {kind.__name__ for kind in type(module).__mro__}:
            raise InvalidInput(
                f"{name or 'model'} is a {type(module).__name__}, of whose weights each rank holds a part; give the model as it is "
                "before FSDP shards it, and shard it afterwards."
            )


@contextmanager
def out_of_inference_mode() -> Iterator[None]:
    """Inside the block tensors that are made can be kept, changed and differentiated; without gradients as before."""
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield
