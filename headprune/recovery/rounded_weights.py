"""Quantisation-aware training: passes see rounded weights, what learns are the weights behind them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from headprune.arguments import check_arguments
from headprune.errors import InvalidInput
from headprune.nn.replace import through_modules
from headprune.recovery.quantise import GROUP, in_seven_bits, refuse_unknown_form, rounded_layers


@contextmanager
def rounded_weights(model: nn.Module, form: str = "int8", *, group: int = GROUP) -> Iterator[tuple[str, ...]]:
    """Inside the block the linear layers that `quantise` would round compute with weights rounded so (in "w8a8" inputs too), in
    floating point (torchao's fake quantisation), and gradients pass the rounding as if it were not there (Jacob et al. 2018,
    section 3; Bengio et al. 2013), but for weights beyond the largest number. Gives the names of these layers. Afterwards `model`
    is as it was, but for what it learnt.

    form, group: as of `quantise`, whose errors are raised.
    """
    check_arguments(rounded_weights, locals())
    chosen, _ = rounded_layers(model, form, group)
    wrapped = next((name for name, module in chosen.items() if "forward" in vars(module)), None)
    if wrapped is not None:
        raise InvalidInput(
            f"{wrapped} has a forward of its own (accelerate's offloading?), past which its weights cannot be rounded."
        )
    reduced = form == "w8a8" and in_seven_bits(model)
    rounding = fake_quantiser(form, group, reduced)

    def forward(module: nn.Linear, x: Tensor) -> Tensor:
        if form == "w8a8" and x.numel():
            now = x.detach()
            x = x + (rounding(now.flatten(0, -2)).view_as(now) - now)  # each token's row, as those of a weight
        return F.linear(x, rounding(module.weight), module.bias)

    try:
        for module in chosen.values():
            vars(module)["forward"] = MethodType(forward, module)
        with through_modules():
            yield tuple(chosen)
    finally:
        for module in chosen.values():
            vars(module).pop("forward", None)


def refuse_untrainable(form: str, method: str) -> None:
    """InvalidInput for an unknown form, and for a recovery method whose weights would be rounded otherwise than in training."""
    refuse_unknown_form(form)
    if method == "lora":
        raise InvalidInput(
            f"quantise={form!r} trains the weights that are rounded, and method='lora' adds to them; give 'full' or 'projections'."
        )


def fake_quantiser(form: str, group: int, reduced: bool = False) -> Callable[[Tensor], Tensor]:
    """weight [out, in] -> the weight that `quantise` would compute with, of the same dtype. reduced: in 7 bits of int8."""
    from torchao.quantization import PerAxis, PerGroup
    from torchao.quantization.qat import FakeQuantizerBase, IntxFakeQuantizeConfig

    types: Any = torch  # whose own types leave int4 and int7 out
    in_groups = form == "int4"
    kind = types.int4 if in_groups else types.int7 if reduced else torch.int8
    settings = IntxFakeQuantizeConfig(kind, PerGroup(group) if in_groups else PerAxis(0), scale_precision=None)
    rounding: Callable[[Tensor], Tensor] = FakeQuantizerBase.from_config(settings)
    if in_groups:
        return rounding
    return lambda weight: rounding(weight.float()).to(weight.dtype)  # torchao's int8 has its scales in fp32
