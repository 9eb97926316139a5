"""transformers' own per-layer head counts (`per_layer_config`, since 5.14): what its caches and other engines read."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedConfig

from headprune.head_map import HeadMap
from headprune.surgery.modeling_headprune import differs_by_itself, forget_counts, say_counts

GLOBAL_COUNTS = logging.getLogger("transformers.integrations.heterogeneity.configuration_utils")


@contextmanager
def validated_quietly() -> Iterator[None]:
    """In the block transformers does not warn of itself: its own checks of a config look at the global counts, which a pruned model
    keeps for them."""

    def other(record: logging.LogRecord) -> bool:
        return "per-layer attribute" not in str(record.msg)

    GLOBAL_COUNTS.addFilter(other)
    try:
        yield
    finally:
        GLOBAL_COUNTS.removeFilter(other)


def set_layer_config(config: PreTrainedConfig, head_maps: Mapping[str, HeadMap], head_dims: Mapping[str, int]) -> None:
    """Writes the counts of each layer into `config`, or takes old ones away where they cannot be said.

    head_maps and head_dims: by site name. They can be said where every layer has one attention and all have one head_dim, and where
    those without one are of another type in `config.layer_types` (linear attention); how ragged groups are made up stands in the
    `headprune` section alone.
    `head_dim` is made explicit, because it no longer follows from the number of heads; the global counts stay those of the
    original. A config whose layers differ by themselves (Gemma 4) stays as it is: its model is built from that.
    """
    if differs_by_itself(config):
        return
    config.per_layer_config = None
    forget_counts(config)
    numbered = by_layer(head_maps)
    if len(numbered) != len(head_maps) or not all_layers(config, numbered) or len(set(head_dims.values())) != 1:
        return
    if getattr(config, "head_dim", None) is None:
        config.head_dim = next(iter(head_dims.values()))
    config.allow_global_per_layer_attribute_access = True
    config.per_layer_config = {layer: counts(config, head_map) for layer, head_map in numbered.items()}
    say_counts(config)


def all_layers(config: Any, numbered: Mapping[int, HeadMap]) -> bool:
    """Whether `numbered` holds every layer of `config` that has an attention."""
    layers = set(range(getattr(config, "num_hidden_layers", None) or 0))
    without, types = layers - set(numbered), getattr(config, "layer_types", None) or ()
    if not set(numbered) <= layers or (without and len(types) != len(layers)):
        return False
    return not {types[layer] for layer in without} & {types[layer] for layer in numbered if without}


def by_layer(head_maps: Mapping[str, HeadMap]) -> dict[int, HeadMap]:
    found = {}
    for name, head_map in head_maps.items():
        number = re.search(r"\.(\d+)\.", f".{name}.")
        if number:
            found[int(number.group(1))] = head_map
    return found


def counts(config: PreTrainedConfig, head_map: HeadMap) -> dict[str, Any]:
    """An attention without heads counts as one head: so large a placeholder has a cache that is allocated ahead of time. It is not
    skipped where others read its keys and values."""
    found: dict[str, Any] = {"num_attention_heads": max(head_map.query_heads, 1)}
    if hasattr(config, "num_key_value_heads"):
        found["num_key_value_heads"] = max(head_map.kv_heads, 1)
    return found if head_map.query_heads or head_map.kv_heads else {**found, "skip": ["attention"]}
