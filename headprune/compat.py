"""For those who come from transformers 4: `model.prune_heads`, which transformers 5 no longer has."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from headprune.errors import InvalidInput
from headprune.head_map import HeadMap, integers
from headprune.models import AttentionSite, attention_sites
from headprune.nn.replace import on_own_attention
from headprune.surgery.cut import cut
from headprune.surgery.record import record_of


@on_own_attention
def prune_heads(model: nn.Module, heads_to_prune: Mapping[int, Iterable[int]], *, within: str = "") -> None:
    """Removes heads from the self-attentions of `model`, in place, as `model.prune_heads` did in transformers 4.

    Args:
        heads_to_prune: layer number -> heads to remove, {0: [1], 1: [2, 3]}. Heads are numbered as in the unpruned model, over
            all calls; those that are gone already are ignored. With grouped key/value heads the numbers are of query heads.
        within: path of the part whose layers are meant, where a model has several stacks of them ("model.encoder").

    Cross attention stays whole; `headprune.cut` reaches it by name.
    Raises InvalidInput for a layer or a head that does not exist, or where it is not clear which stack is meant.
    """
    if not isinstance(heads_to_prune, Mapping):
        raise InvalidInput(f"heads_to_prune is {heads_to_prune!r:.100}; expected a dict: layer number -> the heads to remove.")
    layers = self_attentions(model, within)
    record = record_of(model).get("sites", {})
    keep: dict[str, list[int]] = {}
    for layer, heads in heads_to_prune.items():
        if layer not in layers:
            raise InvalidInput(f"layer {layer!r} has no self-attention; the layers that have one are {sorted(layers)}.")
        for site in layers[layer]:
            keep[site.name] = kept_after(site, record.get(site.name), set(integers(heads)))
    cut(model, keep)


def kept_after(site: AttentionSite, record: Mapping[str, Any] | None, removed: set[int]) -> list[int]:
    """The heads of `site`, as they are numbered now, that are left without those `removed`, numbered as in the original."""
    original = HeadMap.from_json(record["original"]) if record else site.head_map
    present = record["kept"] if record else range(site.head_map.query_heads)
    original.checked(removed)
    return [now for now, head in enumerate(present) if head not in removed]


def self_attentions(model: nn.Module, within: str) -> dict[int, list[AttentionSite]]:
    """Layer number -> its self-attentions. Where layers are numbered twice (stages of blocks) they are counted in order."""
    inside = f"{within}." if within else ""
    sites = [site for site in attention_sites(model) if site.kind == "self" and site.name.startswith(inside)]
    stacks: dict[str, list[AttentionSite]] = {}
    for site in sites:
        stacks.setdefault(stack_of(site.name), []).append(site)
    if len(stacks) != 1:
        found = f"stacks of layers: {', '.join(stacks)}" if stacks else "no self-attention"
        raise InvalidInput(f"{type(model).__name__} has {found}{f' in {within}' if within else ''}; name one by within=...")
    numbers = [[int(part) for part in site.name.split(".") if part.isdecimal()] for site in sites]
    varying = [place for place, found in enumerate(zip(*numbers)) if len(set(found)) > 1] or [0]
    layers: dict[int, list[AttentionSite]] = {}
    for order, (site, places) in enumerate(zip(sites, numbers)):
        layers.setdefault(places[varying[0]] if len(varying) == 1 else order, []).append(site)
    return layers


def stack_of(name: str) -> str:
    """The path above the first number: model.encoder.layers.3.self_attn is in model.encoder.layers."""
    parts = name.split(".")
    return ".".join(parts[: next((place for place, part in enumerate(parts) if part.isdecimal()), len(parts))])
