"""What a model takes to store: counted, written and, for sparse forms that nobody here writes, computed."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_model
from torch import Tensor, nn

from headprune.comparison.method import Compressed
from headprune.models.site import Foreign


def plain(model: nn.Module) -> bool:
    """Whether every parameter is an ordinary tensor, as a file of weights holds them; quantised ones are not."""
    return all(type(parameter) in (nn.Parameter, Tensor) for parameter in model.parameters())


def nonzero_parameters(model: nn.Module) -> int | None:
    """Distinct parameters that are not 0; None for quantised ones."""
    return sum(int(torch.count_nonzero(parameter)) for parameter in model.parameters()) if plain(model) else None


def file_bytes(model: nn.Module) -> int | None:
    """Size of the model's safetensors file, zeros and all: it is written and looked at. None for quantised weights."""
    if not plain(model):
        return None
    with tempfile.TemporaryDirectory(prefix="headprune-") as folder:
        path = Path(folder) / "model.safetensors"
        save_model(model, str(path))
        return path.stat().st_size


def compact_bytes(found: Compressed, in_file: int | None) -> int | None:
    """Bytes of the smallest form: the file's, with the masked weights stored sparsely (computed); else what the method says."""
    if found.stored_bits is None or in_file is None:
        return found.compact_bytes
    modules: dict[str, Foreign] = {name: found.model.get_submodule(name) for name in found.masks}
    weights: dict[str, Tensor] = {name: module.weight for name, module in modules.items()}
    dense = sum(weight.numel() * weight.element_size() for weight in weights.values())
    sparse = sum(math.ceil(found.stored_bits(found.masks[name], 8 * weight.element_size()) / 8) for name, weight in weights.items())
    return min(in_file, in_file - dense + sparse)


def bitmask_bits(mask: Tensor, bits: int) -> int:
    """One bit for each weight, and the values that stay."""
    return mask.numel() + int(mask.sum()) * bits


def two_of_four_bits(mask: Tensor, bits: int) -> int:
    """The values that stay, each with its place among four in 2 bits, as sparse tensor cores read them."""
    return int(mask.sum()) * (bits + 2)
