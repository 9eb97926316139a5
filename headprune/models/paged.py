"""Continuous batching in transformers (`generate_batch`) of models whose layers have other numbers of key/value heads than their
config says, which are those of the original.

Its paged cache has room for as many in every layer. A layer that has fewer hands over its keys and values filled up with zeros, and
takes its own back.
"""

from __future__ import annotations

import inspect
import sys
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

UPDATE = {"self", "key_states", "value_states", "layer_idx", "kwargs"}  # arguments of the cache's update


def batched_continuously(model: Any, start: Callable[[], Any]) -> Any:
    """The manager that `start`, the stock class's `init_continuous_batching`, gives for `model`, with such a cache. It knows no
    "headprune" attention: sdpa, or eager, takes its place until the manager stops.

    Raises ValueError where this cannot be done, which transformers would notice at every request.
    """
    chosen = model.config._attn_implementation
    try:
        if chosen == "headprune":
            model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
        manager = start()
        refuse_flash(model)
        if "_create_batch_processor" not in vars(manager):  # one that lives on is given again
            make_room(model, manager)
    except Exception:
        if model.config._attn_implementation != chosen:
            model.set_attn_implementation(chosen)
        raise
    if chosen == "headprune":
        manager._original_attn_impl = chosen  # set again when it stops
    return manager


def refuse_flash(model: Any) -> None:
    """ValueError where ragged groups would go through flash attention, which reads the paged cache by itself."""
    found = model.config._attn_implementation
    if "flash" in found and any(expands(module) for module in model.modules()):
        raise ValueError(
            f"continuous batching of ragged groups knows 'sdpa' and 'eager' attention, not {found!r}: set one of those, and "
            "auto_switch_to_flash=False in the ContinuousBatchingConfig."
        )


def expands(module: Any) -> bool:
    """Whether its groups are ragged, and expanded for the attention that the model is set to."""
    return getattr(getattr(module, "config", None), "_attn_implementation", "") == "headprune_expanded"


def make_room(model: Any, manager: Any) -> None:
    """The cache that `manager` will make takes layers with fewer heads."""
    create = getattr(manager, "_create_batch_processor", None)
    kind: Any = getattr(sys.modules[type(manager).__module__], "PagedAttentionCache", None)
    if create is None or kind is None or set(inspect.signature(kind.update).parameters) != UPDATE:
        refuse_other_counts(model)
        return

    def created() -> Any:
        processor = create()
        cache = processor.cache
        if "update" not in vars(cache):
            # It shall not hold itself: its memory is given back with it.
            cache.update = torch.compiler.disable(partial(filled_up, weakref.proxy(cache), kind.update))
        return processor

    manager._create_batch_processor = created


def filled_up(
    cache: Any, update: Callable[..., Any], key_states: Tensor, value_states: Tensor, layer_idx: int, kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """`update` of the cache's class, for key_states and value_states [1, kv_heads, tokens, head_dim] of any number of heads."""
    heads = key_states.shape[1]
    lacking = (0, 0, 0, 0, 0, max(cache.layer_to_allocator[layer_idx].num_key_value_heads - heads, 0))
    key, value = update(cache, F.pad(key_states, lacking), F.pad(value_states, lacking), layer_idx, kwargs)
    for pages in {"k_cache", "v_cache"} & kwargs.keys():  # flash attention reads and writes them by itself
        kwargs[pages] = kwargs[pages][:, :, :heads]
    return key[:, :heads], value[:, :heads]


def refuse_other_counts(model: Any) -> None:
    """ValueError where a layer would hand the paged cache of an earlier transformers other key/value heads than it has room for."""
    config = model.config.get_text_config()
    room = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    for name, module in model.named_modules():
        heads = getattr(getattr(module, "head_map", None), "kv_heads", getattr(module, "headprune_kv_heads", None))
        if heads not in (None, 0, room) or expands(module):
            raise ValueError(
                f"{name} has {heads} key/value heads{' in ragged groups' * expands(module)}; continuous batching in this "
                f"transformers takes {room} in every layer, in equal groups. Use transformers 5.23, or generate()."
            )


def with_cached(module: Any, key: Tensor, value: Tensor, arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """`key` and `value`; where `arguments` of an attention function hold a paged cache, which is taken out, with what it has of
    the tokens before. Ragged groups are expanded behind it, not in it."""
    cache = arguments.pop("cache", None)
    if cache is None:
        return key, value
    found: tuple[Tensor, Tensor] = cache.update(key_states=key, value_states=value, layer_idx=module.layer_idx, kwargs=arguments)
    return found
