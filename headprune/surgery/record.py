"""The `headprune` section of a model's config: which heads of the original each attention still has.

It travels with the config, so `save_pretrained` writes it and a load knows the shapes before the weights are there. A model
that has no transformers config carries it as an attribute.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from headprune.errors import CorruptCheckpoint
from headprune.head_map import HeadMap
from headprune.models.site import AttentionSite
from headprune.surgery.per_layer_config import set_layer_config

SECTION = "headprune"
ATTRIBUTE = "headprune_record"
VERSION = 1


def record_cut(model: nn.Module, sites: Mapping[str, AttentionSite], kept: Mapping[str, tuple[int, ...]]) -> None:
    """Adds a cut to the model's record; `kept` numbers the heads as they were just before it."""
    earlier = record_of(model).get("sites", {})
    entries = {}
    for name, site in sites.items():
        original = earlier.get(name, {}).get("original", as_json(site.head_map))
        before = earlier.get(name, {}).get("kept", list(range(site.head_map.query_heads)))
        after = [before[head] for head in kept.get(name, range(site.head_map.query_heads))]
        entries[name] = {"original": original, "kept": after, "now": as_json(head_map_after(original, after))}
    set_record(model, {"version": VERSION, "sites": entries})
    config = getattr(model, "config", None)
    if isinstance(config, PreTrainedConfig):
        head_maps = {name: head_map_of_json(entry["now"]) for name, entry in entries.items()}
        set_layer_config(config, head_maps, {name: site.head_dim for name, site in sites.items()})


def record_of(model: nn.Module) -> Mapping[str, Any]:
    """What earlier cuts left; empty for a whole model."""
    config = getattr(model, "config", None)
    carrier, name = (config, SECTION) if isinstance(config, PreTrainedConfig) else (model, ATTRIBUTE)
    return getattr(carrier, name, None) or {}


def set_record(model: nn.Module, record: dict[str, Any]) -> None:
    config = getattr(model, "config", None)
    if isinstance(config, PreTrainedConfig):
        setattr(config, SECTION, record)
    else:
        setattr(model, ATTRIBUTE, record)


def head_map_after(original: Mapping, kept: list[int]) -> HeadMap:
    return head_map_of_json(original).keep(kept)


def head_map_of_json(content: Mapping) -> HeadMap:
    return HeadMap(tuple(content["kv_of_query"]), content["kv_heads"])


def as_json(head_map: HeadMap) -> dict:
    return {"kv_of_query": list(head_map.kv_of_query), "kv_heads": head_map.kv_heads}


def kept_heads(section: Mapping | None) -> dict[str, tuple[int, ...]]:
    """Site name -> kept query heads of the original, from a config's section. Raises CorruptCheckpoint where it is of a
    newer version or incomplete."""
    if not section:
        return {}
    version = section.get("version")
    if not isinstance(version, int) or version > VERSION:
        raise CorruptCheckpoint(f"the headprune section of the config has version {version}; this headprune reads up to {VERSION}.")
    try:
        return {name: tuple(site["kept"]) for name, site in section["sites"].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise CorruptCheckpoint(f"the headprune section of the config is incomplete: {error!r}.") from None
