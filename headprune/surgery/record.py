"""The `headprune` section of a model's config: which heads of the original each attention still has.

It travels with the config, so `save_pretrained` writes it and a load knows the shapes before the weights are there. A model
that has no transformers config carries it as an attribute.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from headprune.errors import CorruptCheckpoint, InvalidInput
from headprune.head_map import HeadMap
from headprune.models.adapters import attention_sites
from headprune.models.site import AttentionSite
from headprune.surgery.modeling_headprune import renamed
from headprune.surgery.per_layer_config import set_layer_config
from headprune.surgery.shown import show_head_map

SECTION = "headprune"
ATTRIBUTE = "headprune_record"
VERSION = 1


def record_cut(model: nn.Module, sites: Mapping[str, AttentionSite], kept: Mapping[str, tuple[int, ...]]) -> None:
    """Adds a cut to the model's record; `kept` numbers the heads as they were just before it."""
    if record_of(model).get("regularised"):
        mark_regularised(model, {site.name: site for site in attention_sites(model)})
        return
    earlier = record_of(model).get("sites", {})
    entries, now = {}, {}
    for name, site in sites.items():
        original = earlier.get(name, {}).get("original", site.head_map.to_json())
        before = earlier.get(name, {}).get("kept", list(range(site.head_map.query_heads)))
        after = [before[head] for head in kept.get(name, range(site.head_map.query_heads))]
        whole = HeadMap.from_json(original)
        now[name] = whole.keep(after)
        entries[name] = {"original": original, "kept": after, "now": now[name].to_json()}
        show_head_map(site.dispatcher, now[name], whole)
    set_record(model, {"version": VERSION, "sites": entries})
    config = getattr(model, "config", None)
    if isinstance(config, PreTrainedConfig):
        set_layer_config(config, now, {name: site.head_dim for name, site in sites.items()})


def refuse_other_record(model: nn.Module, sites: Mapping[str, AttentionSite]) -> None:
    """InvalidInput where the record is of another model: a pruned one whose config object `model` was built from."""
    for name, entry in record_of(model).get("sites", {}).items():
        if name in sites and sites[name].head_map.query_heads != len(entry["kept"]):
            raise InvalidInput(
                f"{name} has {sites[name].head_map.query_heads} query heads, the model's config says {len(entry['kept'])} of a "
                "pruned model, from whose config it was built; give it a config of its own (copy.deepcopy(config) before the cut)."
            )


def mark_regularised(model: nn.Module, sites: Mapping[str, AttentionSite]) -> None:
    """From now on the heads are no longer said to be some of the original's; the layout alone tells them."""
    set_record(model, {"version": VERSION, "regularised": True, "sites": {}})
    for site in sites.values():
        show_head_map(site.dispatcher, site.head_map, None)
    config = getattr(model, "config", None)
    if isinstance(config, PreTrainedConfig):
        head_maps = {name: site.head_map for name, site in sites.items()}
        set_layer_config(config, head_maps, {name: site.head_dim for name, site in sites.items()})


def record_of(model: nn.Module) -> Mapping[str, Any]:
    """What earlier cuts left, by the names that the attentions have in `model` (a base model and the same under a head share
    a config); empty for a whole model. Raises InvalidInput where it names an attention that `model` has not."""
    config = getattr(model, "config", None)
    carrier, name = (config, SECTION) if isinstance(config, PreTrainedConfig) else (model, ATTRIBUTE)
    record = getattr(carrier, name, None) or {}
    if carrier is model:
        return with_parts(model, record)
    if not record or not isinstance(model, PreTrainedModel):
        return record
    try:
        return {**record, "sites": renamed(model, record["sites"])}
    except ValueError as error:
        raise InvalidInput(
            f"{error} Cut by way of the whole model, not of a part that shares its config, and remove layers before heads, not "
            "after."
        ) from None


def with_parts(model: nn.Module, record: Mapping[str, Any]) -> Mapping[str, Any]:
    """The record of a plain module and, of sites that it does not name, those of its parts, which were cut by themselves."""
    sites: dict[str, Any] = {}
    for name, module in model.named_modules():
        inside = vars(module).get(ATTRIBUTE, {}).get("sites", {}) if name else {}
        # The name is empty where the part is the attention itself.
        sites = {f"{name}.{site}".removesuffix("."): entry for site, entry in inside.items()} | sites
    return {"version": VERSION, **record, "sites": {**sites, **record.get("sites", {})}} if sites else record


def share_gone(model: nn.Module) -> float:
    """Of the original's query heads, how many earlier cuts took; 0 where the model does not tell."""
    sites = record_of(model).get("sites", {}).values()
    heads = sum(HeadMap.from_json(site["original"]).query_heads for site in sites)
    return 1 - sum(len(site["kept"]) for site in sites) / heads if heads else 0.0


def set_record(model: nn.Module, record: dict[str, Any]) -> None:
    config = getattr(model, "config", None)
    if isinstance(config, PreTrainedConfig):
        setattr(config, SECTION, record)
    else:
        setattr(model, ATTRIBUTE, record)


def kept_heads(section: Mapping[str, Any] | None) -> dict[str, tuple[int, ...]]:
    """Site name -> kept query heads of the original, from a config's section. Raises CorruptCheckpoint where it is of a
    newer version or incomplete."""
    if not section:
        return {}
    if not isinstance(section, Mapping):
        raise CorruptCheckpoint(f"the headprune section of the config is {section!r:.100}; expected what hp.save wrote there.")
    version = section.get("version")
    if not isinstance(version, int) or version > VERSION:
        raise CorruptCheckpoint(f"the headprune section of the config has version {version}; this headprune reads up to {VERSION}.")
    try:
        return {name: tuple(site["kept"]) for name, site in section["sites"].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise CorruptCheckpoint(f"the headprune section of the config is incomplete: {error!r}.") from None
