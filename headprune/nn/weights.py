"""The weights of a VariableHeadAttention beside those of torch.nn.MultiheadAttention, and slices of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor, nn

from headprune.arguments import is_spread
from headprune.errors import InvalidInput

ROLES = ("q", "k", "v")
OF_TORCH = {"in_proj_weight", "in_proj_bias", "bias_k", "bias_v", "out_proj.weight", "out_proj.bias"}
OF_TORCH |= {f"{role}_proj_weight" for role in ROLES}
UNDO = (
    "undo masks, parametrisations and adapters first (torch.nn.utils.prune.remove, "
    "torch.nn.utils.parametrize.remove_parametrizations, merge_and_unload)"
)


def beside_weights(layer: nn.MultiheadAttention) -> str | None:
    """A parameter of torch's layer that is none of its class: a mask, parametrisation or adapter makes its weights of it."""
    return next((name for name, _ in layer.named_parameters() if name not in OF_TORCH), None)


def check_own_weights(layer: nn.Module) -> None:
    """InvalidInput where a weight of a VariableHeadAttention is no parameter of its own: a cut or copy would miss what makes it."""
    own = [(layer, "", name) for name in ("bias_k", "bias_v", "gate")]
    projections = [f"{role}_proj" for role in ROLES] + ["out_proj"]
    own += [(layer.get_submodule(part), f"{part}.", name) for part in projections for name in ("weight", "bias")]
    for module, part, name in own:
        if getattr(module, name, module) is not None and name not in module._parameters:
            raise InvalidInput(f"{part}{name} is made of others at each call; {UNDO}.")
        if is_spread(getattr(module, name, None)):
            raise InvalidInput(f"{part}{name} is a DTensor, of which each rank has a part; do this before the layer is sharded.")


def torch_parameter(layer: nn.MultiheadAttention, name: str) -> nn.Parameter:
    """The parameter of torch's layer that holds what VariableHeadAttention calls `name`."""
    if name in OF_TORCH:
        return layer.get_parameter(name)
    if name.endswith(".bias"):
        return layer.get_parameter("in_proj_bias")
    return layer.get_parameter("in_proj_weight" if layer._qkv_same_embed_dim else name.replace(".", "_"))


def unpack(state: dict[str, Tensor], prefix: str, kv_of_query: tuple[int, ...], gate: Tensor | None) -> None:
    """Renames, in place, what torch's layer calls its weights; a state dict of our own stays as it is."""
    weights = _pop_parts(state, f"{prefix}in_proj_weight", [f"{prefix}{role}_proj_weight" for role in ROLES])
    if weights is None:
        return
    biases = _pop_parts(state, f"{prefix}in_proj_bias", []) or (None,) * 3
    for role, weight, bias in zip(ROLES, weights, biases):
        state[f"{prefix}{role}_proj.weight"] = weight
        if bias is not None:
            state[f"{prefix}{role}_proj.bias"] = bias
    state[f"{prefix}kv_of_query"] = torch.tensor(kv_of_query, device=weights[0].device)
    if gate is not None:
        state[f"{prefix}gate"] = torch.ones(gate.shape, dtype=gate.dtype, device=weights[0].device)


def _pop_parts(state: dict[str, Tensor], packed: str, separate: list[str]) -> tuple[Tensor, ...] | None:
    if packed in state:
        return state.pop(packed).chunk(3)
    if separate and all(name in state for name in separate):
        return tuple(state.pop(name) for name in separate)
    return None


@overload
def kept(parameter: Tensor, dim: int, features: Tensor) -> nn.Parameter: ...


@overload
def kept(parameter: None, dim: int, features: Tensor) -> None: ...


def kept(parameter: Tensor | None, dim: int, features: Tensor) -> nn.Parameter | None:
    """These `features` of `parameter` along `dim`, a copy; requires_grad stays."""
    if parameter is None:
        return None
    data = parameter.detach().index_select(dim, features.to(parameter.device))
    return nn.Parameter(data, requires_grad=parameter.requires_grad)


@overload
def resized(parameter: Tensor, dim: int, size: int) -> nn.Parameter: ...


@overload
def resized(parameter: None, dim: int, size: int) -> None: ...


def resized(parameter: Tensor | None, dim: int, size: int) -> nn.Parameter | None:
    """An uninitialised parameter like `parameter`, with `size` features along `dim`."""
    if parameter is None:
        return None
    shape = (*parameter.shape[:dim], size, *parameter.shape[dim + 1 :])
    return nn.Parameter(parameter.detach().new_empty(shape), requires_grad=parameter.requires_grad)


def undrawn_linear(
    inputs: int, outputs: int, bias: bool, device: torch.device | str | None, dtype: torch.dtype | None
) -> nn.Linear:
    """A linear layer that has drawn no random numbers; its weights are uninitialised."""
    return nn.Linear(inputs, outputs, bias, device="meta", dtype=dtype).to_empty(device=device or torch.get_default_device())


def draw_like_torch(projections: Sequence[nn.Linear], packed: bool) -> None:
    """Xavier's uniform distribution, and zero biases; packed: as for one matrix of all the projections' rows."""
    for projection in projections:
        rows = sum(other.out_features for other in projections) if packed else projection.out_features
        bound = math.sqrt(6 / (rows + projection.in_features))
        nn.init.uniform_(projection.weight, -bound, bound)
        if projection.bias is not None:
            nn.init.zeros_(projection.bias)
