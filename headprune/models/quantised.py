"""Linear layers whose weights torchao or bitsandbytes quantised: what their heads do can be measured, but they cannot be cut."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig

from headprune.errors import UnsupportedModel

BITSANDBYTES = ("Linear4bit", "Linear8bitLt")
PACKS = "support_avx512bf16_for_cpu"


def is_quantised(module: Any) -> bool:
    return in_bitsandbytes(module) or in_torchao(module)


def in_bitsandbytes(module: Any) -> bool:
    """By its name: the package need not be there."""
    return type(module).__module__.startswith("bitsandbytes.") and type(module).__name__ in BITSANDBYTES


def in_torchao(module: Any) -> bool:
    weight = getattr(module, "weight", None)
    kinds = (type(weight), type(getattr(weight, "data", None)))  # older releases put theirs into a Parameter
    return isinstance(module, nn.Linear) and any(kind.__module__.startswith("torchao.") for kind in kinds)


def weight_shape(module: Any) -> tuple[int, int]:
    """(rows, columns) of the weight, which in 4 bits is packed into another shape."""
    rows, columns = (module.out_features, module.in_features) if is_quantised(module) else module.weight.shape
    return rows, columns


def plain_weight(module: Any) -> Tensor:
    """The weight as numbers: itself, or what its quantised form stands for."""
    weight: Tensor = module.weight
    if in_bitsandbytes(module):
        unpack(module)
        from transformers.integrations.bitsandbytes import dequantize_bnb_weight  # imports bitsandbytes

        weight = dequantize_bnb_weight(module.weight, getattr(module, "state", None))
    elif in_torchao(module):
        weight = module.weight.dequantize()
    return weight.detach()


def parts_of(tensor: Tensor) -> Iterator[Tensor]:
    """`tensor` itself, or what is inside one of torchao's."""
    if hasattr(tensor, "__tensor_flatten__") and type(tensor) not in (Tensor, nn.Parameter):
        for name in tensor.__tensor_flatten__()[0]:
            yield from parts_of(getattr(tensor, name))
    else:
        yield tensor


def refuse_quantised(model: nn.Module, doing: str) -> None:
    """UnsupportedModel where a layer of `model` is quantised, naming what is not done with it, and what can be."""
    name = next((name for name, module in model.named_modules() if is_quantised(module)), None)
    if name is not None:
        raise UnsupportedModel(f"{name} holds quantised weights, which {doing}.")


def refuse_stored_quantised(config: PreTrainedConfig, folder: str | os.PathLike[str]) -> None:
    """UnsupportedModel where the files of `folder` hold quantised weights, whose scales are read nowhere but in transformers."""
    if getattr(config, "quantization_config", None) is not None:
        how: Any = config.quantization_config
        method = how.get("quant_method") if isinstance(how, Mapping) else getattr(how, "quant_method", None)
        raise UnsupportedModel(
            f"the weights in {folder} are quantised ({getattr(method, 'value', method)}), which are not read layer by layer; give "
            "the model as it was before, or load it whole (hp.load)."
        )


@contextmanager
def kept_differentiable(model: nn.Module) -> Iterator[None]:
    """Inside the block gradients pass through the 4-bit layers of `model` on a CPU too, where bitsandbytes packs their weights anew
    for inference the first time that they run without gradients, and from then on gives none."""
    packing = [module for module in model.modules() if in_bitsandbytes(module) and getattr(module, PACKS, False)]
    try:
        for module in packing:
            unpack(module)
            setattr(module, PACKS, False)
        yield
    finally:
        for module in packing:
            setattr(module, PACKS, True)


def unpack(module: nn.Module) -> None:
    if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
        module.state_dict()  # which turns the weights back first
