"""What torch.compile and torch.inference_mode keep from whoever watches a model, and how to do without.

Hooks that are set afterwards are silently left out of code that is compiled already
(torch._dynamo.config.skip_nnmodule_hook_guards), so whatever watches or changes a forward pass by hooks runs it eagerly.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from headprune.errors import InvalidInput


def plain_module(model: Any) -> nn.Module:
    """`model` itself, without the wrapper that torch.compile(model) puts around it, whose names and class are others.

    The wrapper goes on working: it compiles again where the shapes of the weights have changed. InvalidInput where `model` is no
    module.
    """
    if not isinstance(model, nn.Module):
        hint = "hp.load(folder) gives one" if isinstance(model, (str, bytes)) or hasattr(model, "__fspath__") else "give the model"
        raise InvalidInput(f"the model is {model!r:.80}; expected a torch.nn.Module: {hint}.")
    inside = model._modules.get("_orig_mod") if type(model).__name__ == "OptimizedModule" else None
    return model if inside is None else inside


@contextmanager
def eagerly() -> Iterator[None]:
    """Inside the block compiled models run as they are written, with every hook; afterwards their compiled code is used again."""
    with torch.compiler.set_stance("force_eager"):
        yield


def outside_inference() -> AbstractContextManager[Any]:
    """A context in which tensors are made that autograd and in-place changes take, also where the caller is under
    torch.inference_mode(); what was made there before stays unfit for both."""
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext()  # it also turns gradients on
