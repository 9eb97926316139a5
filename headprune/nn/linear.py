"""Linear layers of a model in fp32 on AMD processors: through oneDNN, which there beats the BLAS (MKL) that PyTorch calls."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from headprune.processor import is_amd

SMALLEST = 2**20  # multiply-adds; below, the call costs more than is won (bench/NOTES.md)


@contextmanager
def through_onednn(model: nn.Module) -> Iterator[None]:
    """Inside the block the linear layers of `model` run through oneDNN where that is faster, with gradients as ever.

    Layers that have a forward of their own (of accelerate, say) or are of a subclass keep theirs.
    """
    modules = model.modules() if beats_mkl() else ()
    chosen = [module for module in modules if type(module) is nn.Linear and "forward" not in vars(module)]
    try:
        for module in chosen:
            vars(module)["forward"] = MethodType(forward, module)
        yield
    finally:
        for module in chosen:
            vars(module).pop("forward", None)


def forward(module: nn.Linear, x: Tensor) -> Tensor:
    if not fits(x, module.weight, module.bias):
        return F.linear(x, module.weight, module.bias)
    found: Tensor = OneDnnLinear.apply(x, module.weight, module.bias)  # type: ignore[no-untyped-call]
    return found


class OneDnnLinear(torch.autograd.Function):
    """x [..., in], weight [out, in], bias [out] or None -> [..., out]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if weight.requires_grad else None, weight)
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        rows = grad.flatten(0, -2)
        again = torch.is_grad_enabled()  # to be differentiated in its turn
        return (
            (grad @ weight if again else product(grad, weight.t(), None)) if of_x else None,
            rows.t() @ x.flatten(0, -2) if of_weight else None,  # here MKL is the faster one
            rows.sum(dim=0) if of_bias else None,
        )


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    found: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return found


def fits(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether this call can go through oneDNN, which reads a bias as if it had no gaps, and is worth it."""
    return (
        x.dtype == weight.dtype == torch.float32
        and x.device.type == weight.device.type == "cpu"
        and type(weight) in (nn.Parameter, Tensor)
        and type(x) in (nn.Parameter, Tensor)
        and (bias is None or bias.is_contiguous())
        and x.dim() > 1
        and x.numel() * weight.shape[0] >= SMALLEST
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
    )


@cache
def beats_mkl() -> bool:
    """MKL has its fastest paths for Intel's processors."""
    return is_amd() and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
