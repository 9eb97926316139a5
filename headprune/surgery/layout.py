"""How a pruned model differs from its stock class, as plain data: what `modeling_headprune.py` builds it from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized, type_before_parametrizations
from transformers import PreTrainedModel

from headprune.models import attention_sites
from headprune.models.behaviour import original_class
from headprune.surgery.modeling_headprune import BEHAVIOURS, whole

PLAIN = (bool, int, float, str, type(None))
# Set by training or placing a model, not by its shape.
PASSING = {"training", "gradient_checkpointing"}


def layout_of(model: PreTrainedModel, stock: type[PreTrainedModel]) -> dict[str, dict[str, Any]] | None:
    """Module name -> the shapes of its parameters and buffers, its attributes, forward and head map, where they differ from a fresh
    `stock` of the same config; None where a difference is more than that (another class of module, a hook, a buffer that no file
    holds), so that only headprune can build the model."""
    with whole(model.config) as config, torch.device("meta"):
        fresh = stock(config)
    originals = dict(fresh.named_modules())
    modules = dict(model.named_modules())
    shorter = tuple(f"{name}." for name, module in modules.items() if length(module) < length(originals.get(name)))
    if not set(modules) <= set(originals) or not all(name.startswith(shorter) for name in set(originals) - set(modules)):
        return None
    sites = {id(site.dispatcher): site.head_map for site in attention_sites(model)}
    layout: dict[str, dict[str, Any]] = {}
    for name, module in modules.items():
        entry = difference(module, originals[name]) if name else {}
        if entry is None:
            return None
        if id(module) in sites:
            entry["head_map"] = sites[id(module)].to_json()
            entry["shown"] = module.extra_repr()
        if entry:
            layout[name] = entry
    return layout


def difference(module: nn.Module, original: nn.Module) -> dict[str, Any] | None:
    """What `layout_of` says of one module; None where it cannot be said."""
    behaviour = vars(type(module)).get("headprune_behaviour")
    if class_of(module) is not class_of(original) or (behaviour is not None and behaviour.__name__ not in BEHAVIOURS):
        return None
    if hooks(module) != hooks(original) or set(buffers(module)) != set(buffers(original)):
        return None
    changed = {name: list(shape) for name, shape in buffers(module).items() if shape != buffers(original)[name]}
    if not module._non_persistent_buffers_set.isdisjoint(changed):
        return None
    shapes = shapes_of(module)
    if set(shapes) != set(shapes_of(original)):
        return None
    old, new = plain_attributes(original), plain_attributes(module)
    # By its attribute: a folder that says its layout is built with modeling_headprune's class of that name.
    own = vars(module.config).get("own", {}) if hasattr(getattr(module, "config", None), "shared") else {}
    entry = {
        "shapes": {name: shape for name, shape in shapes.items() if shape != shapes_of(original)[name]},
        "buffers": changed,
        "attributes": {name: value for name, value in new.items() if name in old and value != old[name]}
        | ({} if behaviour is None else attributes_of_its_own(module, original)),
        "config": dict(own),
    }
    found: dict[str, Any] = {part: values for part, values in entry.items() if values}
    if behaviour is not None:
        found["behaviour"] = behaviour.__name__
    if length(module) < length(original):
        found["modules"] = length(module)
    return found


def class_of(module: nn.Module) -> type:
    """torch makes a class for each module with a parametrisation (weight_norm in wav2vec 2.0); before that it had its family's."""
    return type_before_parametrizations(module) if is_parametrized(module) else original_class(module)


def attributes_of_its_own(module: nn.Module, original: nn.Module) -> dict[str, Any]:
    """What another forward counts on and the stock module has not: names, and numbers of heads."""
    added = {name: value for name, value in vars(module).items() if name not in vars(original) and name[0] != "_"}
    return {name: value for name, value in added.items() if isinstance(value, (*PLAIN, tuple))}


def length(module: nn.Module | None) -> int:
    """Of a list of modules, one for each head (StableLM's norms)."""
    return len(module) if isinstance(module, nn.ModuleList) else 0


def shapes_of(module: nn.Module) -> dict[str, list[int]]:
    return {name: list(value.shape) for name, value in module.named_parameters(recurse=False)}


def buffers(module: nn.Module) -> Mapping[str, torch.Size]:
    return {name: value.shape for name, value in module.named_buffers(recurse=False)}


def hooks(module: nn.Module) -> tuple[int, int]:
    """But for those with which transformers, from a model's first pass on, collects what layers give."""
    found = [module._forward_hooks.values(), module._forward_pre_hooks.values()]
    behind, before = (sum(not getattr(hook, "__module__", "").startswith("transformers.") for hook in hooks) for hooks in found)
    return behind, before


def plain_attributes(module: nn.Module) -> dict[str, Any]:
    return {
        name: value for name, value in vars(module).items() if isinstance(value, PLAIN) and name not in PASSING and name[0] != "_"
    }
