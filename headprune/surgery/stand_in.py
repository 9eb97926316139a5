"""A stand-in for an attention: its module tree in new objects, so that a cut can be tried there and the model stays as it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor, nn

from headprune.models.site import AttentionSite


def same(tensor: Tensor) -> Tensor:
    return tensor


def widened(tensor: Tensor) -> Tensor:
    """bf16, fp16 and float8 as fp32, in which every value of theirs is exact; anything else as it is."""
    if not tensor.is_floating_point() or tensor.itemsize >= 4:
        return tensor
    return nn.Parameter(tensor.float(), requires_grad=False) if isinstance(tensor, nn.Parameter) else tensor.float()


def on_stand_ins(site: AttentionSite, of: Callable[[Tensor], Tensor] = same) -> AttentionSite:
    """The same site on a stand-in for its module, whose tensors are `of` those there; by default the very same ones. All that the
    site cuts must lie below that module."""
    made: dict[nn.Module, nn.Module] = {}
    module = stand_in(site.module, made, of)
    projections = tuple(replace(part, module=made[part.module]) for part in site.projections)
    extras = tuple(replace(part, module=made[part.module]) for part in site.extras)
    modules = tuple(replace(part, module=made[part.module]) for part in site.head_modules)
    twin = replace(site, module=module, dispatcher=made[site.dispatcher], projections=projections, extras=extras)
    return replace(twin, head_modules=modules)


def stand_in(module: nn.Module, made: dict[nn.Module, nn.Module], of: Callable[[Tensor], Tensor] = same) -> nn.Module:
    """The same module tree in new module objects: what is cut or hooked there leaves `module` alone. made: module -> stand-in."""
    if module not in made:
        twin = made[module] = type(module).__new__(type(module))
        for name, value in module.__dict__.items():
            if name in ("_parameters", "_buffers"):
                value = {key: None if tensor is None else of(tensor) for key, tensor in value.items()}
            elif name in ("_non_persistent_buffers_set", "_forward_pre_hooks"):
                value = value.copy()
            elif isinstance(value, Tensor):
                value = of(value)
            twin.__dict__[name] = value
        twin.__dict__["_modules"] = {
            name: child if child is None else stand_in(child, made, of) for name, child in module._modules.items()
        }
    return made[module]
