"""Autocast for the operators: query, key and value (or the caches) get the region's dtype, as in torch's own attention.

Masks, biases, slopes, sinks and gates keep theirs: they are small, and every backend computes them in fp32. A backward
called inside the region casts nothing: what it gets was cast before.
torch.library.register_autocast knows one fixed dtype; here it is the one that is active at the call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from headprune.ops.call import dtype_under_autocast

# How many of an operator's first operands are cast.
_CAST = {"attention": 3, "attention_varlen": 3, "attention_decode": 3, "attention_backward": 0, "attention_varlen_backward": 0}


def register_autocast(library: torch.library.Library) -> None:
    for name, count in _CAST.items():
        operator = getattr(torch.ops.headprune, name).default
        for key in ("AutocastCPU", "AutocastCUDA"):
            library.impl(name, _casting(operator, count, getattr(torch._C.DispatchKey, key)), key)


def _casting(operator: torch._ops.OpOverload, count: int, key: torch._C.DispatchKey) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        cast = [tensor.to(dtype_under_autocast(tensor)) for tensor in args[:count]]
        # The backends' own products must not be cast again.
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
            return operator(*cast, *args[count:])

    return run
