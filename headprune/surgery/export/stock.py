"""stock: the unmodified transformers class. All layers get the same counts, filled up with dead heads (all zeros)."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from headprune.errors import UnsupportedModel
from headprune.head_map import HeadMap
from headprune.models import attention_sites
from headprune.models.site import AttentionSite, HeadModules
from headprune.nn.replace import own_attention, restore_multihead_attention
from headprune.surgery.export.regularise import fill
from headprune.surgery.export.same_output import same_output, small_output
from headprune.surgery.export.slots import Slots, common_counts, in_groups
from headprune.surgery.export.target import refuse_other_weights, refuse_unknown, target
from headprune.surgery.modeling_headprune import differs_by_itself, forget_counts
from headprune.surgery.record import SECTION, record_of
from headprune.surgery.remote_code import stock_class


@target("stock", "the unmodified transformers class, and everything that reads its folders")
def write_stock(model: PreTrainedModel, folder: Path, options: dict[str, Any]) -> list[str]:
    refuse_unknown(options)
    refuse_other_weights(model)
    dense, notes = stock_model(model)
    dense.save_pretrained(folder)
    return notes


@torch.no_grad()
def stock_model(model: PreTrainedModel) -> tuple[PreTrainedModel, list[str]]:
    """A model of the stock class with the outputs of `model`, at the fewest heads that the class can have in all layers
    alike, and what that took. Raises UnsupportedModel where not even the original's counts fit."""
    stock, expected = stock_class(type(model)), small_output(model)
    with own_attention(model):
        sites = attention_sites(model)
        config, slots = smaller_config(model, stock, sites) or (original_config(model.config), original_slots(model, sites))
        with torch.device(expected.device):
            built: Any = stock
            dense: PreTrainedModel = built._from_config(config, dtype=model.dtype).eval()  # not .to: frequencies stay fp32
        with own_attention(dense, keep=True):
            counts = fill_model(model, sites, dense, slots)
    restore_multihead_attention(dense)
    if model.can_generate():
        dense.generation_config = copy.deepcopy(model.generation_config)
    check = same_output(expected, small_output(dense), stock.__name__)
    before, after = (sum(parameter.numel() for parameter in found.parameters()) for found in (model, dense))
    return dense, [f"all layers have {counts} with dead heads: {after - before:+,} parameters", check]


def fill_model(model: PreTrainedModel, sites: list[AttentionSite], dense: PreTrainedModel, slots: Mapping[str, Slots]) -> HeadMap:
    """Gives `dense` all that `model` has, the heads in `slots`, and returns those of its first attention. Raises UnsupportedModel
    where one of them has a parameter that the other lacks."""
    twins = {site.name: site for site in attention_sites(dense)}
    of_heads = {name for site in sites for name in parameters_of_heads(model, site)}
    rest = {name: value for name, value in model.state_dict().items() if name not in of_heads}
    there = dense.state_dict()
    smaller = next((name for name, value in rest.items() if name in there and there[name].shape != value.shape), None)
    if smaller is not None:
        raise UnsupportedModel(
            f"{type(model).__name__} cannot become an unmodified {type(dense).__name__}: {smaller} went with the last head of its "
            "attention, and counts in the class without heads too. Keep one head there."
        )
    missing, unexpected = dense.load_state_dict(rest, strict=False)
    lacking = set(missing) - {name for site in sites for name in parameters_of_heads(dense, twins[site.name], site)}
    if unexpected or lacking:
        raise UnsupportedModel(
            f"{type(model).__name__} cannot become an unmodified {type(dense).__name__}: {(sorted(lacking) + unexpected)[0]} is in "
            "one of them only."
        )
    for site in sites:
        fill_site(site, twins[site.name], slots[site.name])
    return next(iter(twins.values())).head_map


def parameters_of_heads(model: nn.Module, site: AttentionSite, source: AttentionSite | None = None) -> set[str]:
    """Names in the state dict of what `fill_site` sets in `site`. source: where it takes that from; default from `site`."""
    pairs = zip(site.projections, (source or site).projections)
    projections = [projection for projection, old in pairs if not old.whole]
    owned = {id(projection.module.weight) for projection in projections}
    owned |= {id(projection.module.bias) for projection in projections if projection.bias_per_head}
    owned |= {id(extra.tensor) for extra in site.extras}
    owned.add(id(getattr(site.dispatcher, "kv_of_query", None)))  # a buffer of VariableHeadAttention
    owned |= {id(parameter) for part in site.head_modules for parameter in modules_of(part).parameters()}
    return {name for name, value in model.state_dict(keep_vars=True).items() if id(value) in owned}


def fill_site(site: AttentionSite, twin: AttentionSite, slots: Slots) -> None:
    """Sets the heads of `twin` to those of `site` in `slots`, all others to zero."""
    heads = {False: slots.query, True: slots.kv}
    for old, new in zip(site.projections, twin.projections):
        if old.whole:  # all of it is still there, behind a norm over all heads; an attention without heads has none of it
            continue
        chosen = heads[new.per_kv_head]
        zero(new.module.weight, new.weight_dim, new.features)
        fill(new.module.weight, new.weight_dim, new.features, old.module.weight, old.features, chosen)
        if new.bias_per_head:
            zero(new.module.bias, 0, new.features)
            fill(new.module.bias, 0, new.features, old.module.bias, old.features, chosen)
    for own, extra in zip(site.extras, twin.extras):
        living = [(place, head) for place, head in enumerate(heads[extra.per_kv_head]) if head is not None]
        places, sources = extra.features([pair[0] for pair in living]), own.features([pair[1] for pair in living])
        values = own.tensor.index_select(own.dim, sources.to(own.tensor.device)).to(extra.tensor)
        extra.tensor.data.index_copy_(extra.dim, places.to(extra.tensor.device), values)
    for own_part, part in zip(site.head_modules, twin.head_modules):
        for place, head in enumerate(heads[part.per_kv_head]):
            if head is not None:
                modules_of(part)[place].load_state_dict(modules_of(own_part)[head].state_dict())


def modules_of(part: HeadModules) -> nn.ModuleList:
    found: nn.ModuleList = getattr(part.module, part.attribute)
    return found


def zero(tensor: torch.Tensor, dim: int, features: torch.Tensor) -> None:
    tensor.data.index_fill_(dim, features.flatten().to(tensor.device), 0)


def original_slots(model: PreTrainedModel, sites: list[AttentionSite]) -> Mapping[str, Slots]:
    """Every head where it was in the original."""
    record = record_of(model).get("sites", {})
    found = {}
    for site in sites:
        entry = record.get(site.name)
        original = site.head_map if entry is None else HeadMap.from_json(entry["original"])
        kept = range(site.head_map.query_heads) if entry is None else entry["kept"]
        places = {head: place for place, head in enumerate(kept)}
        kv_places = {head: place for place, head in enumerate(original.kept_kv_heads(kept))}
        found[site.name] = Slots(
            tuple(places.get(head) for head in range(original.query_heads)),
            tuple(kv_places.get(head) for head in range(original.kv_heads)),
        )
    return found


def original_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """`config` without anything that headprune put there."""
    found = copy.deepcopy(config)
    if not differs_by_itself(found):
        found.per_layer_config = None
        forget_counts(found)
    for name in (SECTION, "auto_map", "allow_global_per_layer_attribute_access"):
        found.__dict__.pop(name, None)
    return found


def smaller_config(
    model: PreTrainedModel, stock: type[PreTrainedModel], sites: list[AttentionSite]
) -> tuple[PreTrainedConfig, Mapping[str, Slots]] | None:
    """A config with fewer heads that the class obeys in every layer, tried on the meta device; None where it obeys none."""
    alike = {(site.head_dim, site.value_dim, site.hidden_size, site.kind) for site in sites}
    whole = any(projection.whole for site in sites for projection in site.projections)
    if len(alike) != 1 or whole or any(hasattr(site.module, "position_heads") for site in sites):
        return None
    original = original_config(model.config)
    # Several towers, each with a config of its own; widths of each stage in a list (MobileViT).
    if not hasattr(original, "num_attention_heads") or not isinstance(getattr(original, "hidden_size", None), int):
        return None
    most = HeadMap.uniform(original.num_attention_heads, getattr(original, "num_key_value_heads", None))

    # Where it is derived from the number of heads it must now be said; latent attention means something else by it.
    derived = getattr(original, "head_dim", None) or original.hidden_size // original.num_attention_heads

    def with_counts(query_heads: int, kv_heads: int) -> PreTrainedConfig:
        config = copy.deepcopy(original)
        config.num_attention_heads = query_heads
        if derived == sites[0].head_dim:
            config.head_dim = derived
        if hasattr(config, "num_key_value_heads"):
            config.num_key_value_heads = kv_heads
        return config

    def allowed(query_heads: int, kv_heads: int) -> bool:
        try:
            config = type(original).from_dict(with_counts(query_heads, kv_heads).to_dict())
            with torch.device("meta"):
                twins = attention_sites(stock(config))
        except (ValueError, RuntimeError, AttributeError, UnsupportedModel, ZeroDivisionError, StrictDataclassError):
            return False
        counts = HeadMap.uniform(query_heads, kv_heads)
        return all((twin.head_map, twin.head_dim) == (counts, sites[0].head_dim) for twin in twins)

    query_cost, kv_cost = (sites[0].parameters_per_head(per_kv_head) for per_kv_head in (False, True))
    found = common_counts([site.head_map for site in sites], query_cost, kv_cost, most, allowed)
    if found is None or found[0] >= most.query_heads:
        return None
    query_heads, kv_heads = found
    slots = {site.name: in_groups(site.head_map, query_heads // kv_heads, kv_heads) for site in sites}
    return with_counts(query_heads, kv_heads), slots
