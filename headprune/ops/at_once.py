"""Running an operator: its implementation at once where nobody else would see it, else through PyTorch's dispatcher, which takes
longer than a small call.

Whoever has to see an operator leaves a dispatch key: modes, transforms, tracing and autocast in the thread; wrappers and
other devices on the tensor, where no subclass tells. Function modes alone are counted.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from headprune.ops.backend import choose, reference
from headprune.ops.call import AttentionCall, DecodeCall, VarlenCall, operands

_C: Any = torch._C


def _bits(*names: str) -> int:
    """A set of dispatch keys."""
    found = _C.DispatchKeySet(getattr(_C.DispatchKey, names[0]))
    for name in names[1:]:
        found = found.add(getattr(_C.DispatchKey, name))
    return int(found.raw_repr())


_AUTOCAST = _bits("AutocastCPU", "AutocastCUDA")  # a thread excludes them where it is off
_IN_A_THREAD = _bits("BackendSelect", "ADInplaceOrView")
_ON_A_TENSOR = _bits("CPU", "CUDA", "ADInplaceOrView", "AutogradCPU", "AutogradCUDA", "AutocastCPU", "AutocastCUDA")


def run_operator(name: str, call: AttentionCall | VarlenCall | DecodeCall) -> Any:
    """What the operator headprune::`name` gives for `call`. Where whoever asks knows PyTorch's own operators alone (forward
    derivatives, torch.func's transforms, an export to ONNX) the reference computes, which is made of them."""
    if not torch.compiler.is_compiling():
        if forward_ad._current_level >= 0:
            return reference(name).run(call)
        if _thread_at_rest() and _at_rest(vars(call).values()):
            return choose(name, call).run(call)
        if _C._are_functorch_transforms_active():
            return reference(name).run(call)
    elif torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export():
        return reference(name).run(call)
    return getattr(torch.ops.headprune, name).default(*operands(call))


def _at_rest(values: Iterable[Any]) -> bool:
    """Whether no gradient is recorded for the tensors among `values`, and nobody but a backend sees them."""
    recording = torch.is_grad_enabled()
    for value in values:
        kind = type(value)
        if kind is Tensor or kind is Parameter:
            if (recording and value.requires_grad) or _C._dispatch_keys(value).raw_repr() & ~_ON_A_TENSOR:
                return False
        elif issubclass(kind, Tensor):
            return False
    return True


def _thread_at_rest() -> bool:
    others = _C._dispatch_tls_local_include_set().raw_repr() & ~_IN_A_THREAD
    casting = _AUTOCAST & ~_C._dispatch_tls_local_exclude_set().raw_repr()
    return not (others or casting or _C._len_torch_function_stack())
