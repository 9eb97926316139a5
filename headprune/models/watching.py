"""Watching every attention of a model; transformers models run through our attention for the while."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from headprune.attention_interface import NAME
from headprune.models.site import AttentionSite
from headprune.ops.watch import Watcher, watched

IMPLEMENTATION = "_attn_implementation_internal"  # where a transformers config keeps it; its property would reach sub-configs


@contextmanager
def through_headprune(model: nn.Module) -> Iterator[None]:
    """Inside the block all transformers models in `model` that can change their attention use attn_implementation="headprune";
    afterwards each config says again what it said."""
    outer = transformers_models(model)
    before = {id(config): (config, getattr(config, IMPLEMENTATION)) for config in configs(outer)}
    try:
        for part in outer:
            if part.config._attn_implementation != NAME and part._can_set_attn_implementation():
                part.set_attn_implementation(NAME)
        yield
    finally:
        for config, implementation in before.values():
            setattr(config, IMPLEMENTATION, implementation)


def transformers_models(model: nn.Module) -> list[PreTrainedModel]:
    """The outermost ones in `model`, itself included."""
    found: list[PreTrainedModel] = []
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and not any(module in set(outer.modules()) for outer in found):
            found.append(module)
    return found


def configs(models: Iterable[PreTrainedModel]) -> list[Any]:
    """The configs of all their parts, with what is nested in them."""
    left: list[Any] = [module.config for model in models for module in model.modules() if hasattr(module, "config")]
    found: dict[int, object] = {}
    while left:
        config = left.pop()
        if id(config) not in found and hasattr(config, IMPLEMENTATION):
            found[id(config)] = config
            left += [getattr(config, name, None) for name in getattr(config, "sub_configs", ())]
    return list(found.values())


@contextmanager
def watching(sites: Iterable[AttentionSite], watcher: Callable[[AttentionSite], Watcher]) -> Iterator[None]:
    """Inside the block each site is watched by `watcher(site)`."""
    with ExitStack() as stack:
        for site in sites:
            stack.enter_context(watched(site.dispatcher, watcher(site)))
        yield
