"""Registers the reference behind every operator: it comes last, after every faster implementation, and refuses nothing."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from headprune.ops import reference
from headprune.ops.backend import Implementation, register

_AUTOGRAD_KEYS = (torch._C.DispatchKey.AutogradCPU, torch._C.DispatchKey.AutogradCUDA, torch._C.DispatchKey.AutogradOther)


def register_reference() -> None:
    runs: dict[str, Callable[..., Any]] = {
        "attention": reference.attention_forward,
        "attention_backward": by_autograd(reference.attention_backward),
        "attention_varlen": reference.attention_varlen_forward,
        "attention_varlen_backward": by_autograd(reference.attention_varlen_backward),
        "attention_decode": reference.attention_decode,
        "head_weight_stats": reference.head_weight_stats,
    }
    for operator, run in runs.items():
        register(operator, Implementation("reference", run, refuses=lambda call: None))


def by_autograd(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A reference backward as an operator calls it. It differentiates the forward, and a compiled graph switches autograd's
    dispatch keys off around its operators: without them every gradient would be 0."""

    @wraps(backward)
    def run(call: Any, grad_output: Tensor, output: Tensor, lse: Tensor, needs: tuple[bool, ...]) -> Any:
        excluded = torch._C._dispatch_tls_local_exclude_set()
        for key in _AUTOGRAD_KEYS:
            excluded = excluded.remove(key)
        with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded):
            return backward(call, grad_output, needs)

    return run
