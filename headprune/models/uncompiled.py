"""Compiled models run without their compiled code: it does not know of hooks that came after it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Inside the block what torch.compile made runs as the Python that it was made of, where `model` has such parts."""
    if not any(is_compiled(module) for module in model.modules()):
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def is_compiled(module: nn.Module) -> bool:
    """By `torch.compile(module)`, `module.compile()` or a compiled forward."""
    whole = "_orig_mod" in module._modules or getattr(module, "_compiled_call_impl", None) is not None
    return whole or hasattr(getattr(module, "forward", None), "_torchdynamo_orig_callable")
