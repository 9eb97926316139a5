"""Equal groups in every layer of a ragged model, without changing its output."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from headprune.errors import UnsupportedModel
from headprune.head_map import HeadMap
from headprune.models import attention_sites
from headprune.models.adapters import adapter_of
from headprune.models.behaviour import original_class
from headprune.models.head_counts import follow_width
from headprune.models.site import AttentionSite, Foreign, ProjectionHeads
from headprune.surgery.cut import set_sizes
from headprune.surgery.export.slots import Slots, cheapest
from headprune.surgery.record import mark_regularised


@dataclass(frozen=True)
class Regularised:
    """What it took: dead query heads and repeated key/value heads, and what both cost."""

    layers: int
    dead_heads: int
    repeated_kv_heads: int
    parameters: int
    kv_cache_values: int  # per token

    def __str__(self) -> str:
        if not self.layers:
            return "all groups are equal already"
        return (
            f"{self.layers} layers made even with {self.dead_heads} dead query heads and {self.repeated_kv_heads} repeated "
            f"key/value heads: {self.parameters:+,} parameters, {self.kv_cache_values:+,} cache values per token"
        )


@torch.no_grad()
def regularise(model: nn.Module, slots: Mapping[str, Slots] | None = None) -> Regularised:
    """Gives every attention of `model` groups of one size, in place; its outputs stay the same.

    slots: by site name; default each layer at its fewest parameters. A layer without heads gets one dead head.
    The model can be saved and loaded after that, but no longer says which heads of the original it has.

    Raises UnsupportedModel where the family does not allow it; the model is untouched then.
    """
    sites = attention_sites(model)
    if slots is None:
        slots = {site.name: cheapest(site.head_map, *(site.parameters_per_head(kv) for kv in (False, True))) for site in sites}
    changed = [site for site in sites if as_laid_out(site.head_map) != slots[site.name].head_map]
    for site in changed:
        check(site, sites)
    changed = [with_widths(site, sites) for site in changed]
    before, cache = sum(site.parameters() for site in sites), cache_values(sites)
    for site in changed:
        lay_out(site, slots[site.name])
    if changed:
        sites = attention_sites(model)
        mark_regularised(model, {site.name: site for site in sites})
    return Regularised(
        len(changed), sum(slots[site.name].dead for site in changed), sum(slots[site.name].repeated for site in changed),
        sum(site.parameters() for site in sites) - before, cache_values(sites) - cache,
    )  # fmt: skip


def as_laid_out(head_map: HeadMap) -> HeadMap:
    """The same heads, as slots tell them."""
    return replace(head_map, kv_stay=False)


def does_nothing(site: AttentionSite) -> bool:
    """Whether an engine may skip the attention: no heads, and no output bias, which would still be added."""
    bias = getattr(site.output.module, "bias", None)
    return not site.head_map.query_heads and (bias is None or not bias.any())


def cache_values(sites: list[AttentionSite]) -> int:
    return sum(site.cache.of(site.head_map) for site in sites)


def check(site: AttentionSite, sites: list[AttentionSite]) -> None:
    """UnsupportedModel where a head is more than its weights. One without heads does not show it; others of its kind do."""
    alike = [other for other in sites if original_class(other.module) is original_class(site.module)]
    if site.head_map.kv_stay:
        reason = "shares its key/value heads with other layers"
    elif not site.has_layers:
        reason = "holds its heads in no linear layers"
    elif any(other.head_modules for other in alike):
        reason = "has a module of its own for each head, which a dead head lacks"
    elif hasattr(site.module, "position_heads") or any(part.whole for other in alike for part in other.projections):
        reason = "picks its heads out of something made for all heads of the original"
    else:
        return
    raise UnsupportedModel(
        f"{site.name} ({type(site.module).__name__}) {reason}, so dead heads cannot be added. Export to stock, or plan so that "
        "groups stay equal (target=...)."
    )


def with_widths(site: AttentionSite, sites: list[AttentionSite]) -> AttentionSite:
    """`site`; where it has no heads, with the features that each head of others of its kind has in each projection: a gate beside
    the query, or in a layer of its own, is not seen in what is left. Raises UnsupportedModel where none shows a gate's width."""
    if site.head_map.query_heads:
        return site
    kind = (original_class(site.module), site.head_dim, site.value_dim, [part.name.rpartition(".")[2] for part in site.projections])
    for other in sites:
        names = [part.name.rpartition(".")[2] for part in other.projections]
        if other.head_map.query_heads and (original_class(other.module), other.head_dim, other.value_dim, names) == kind:
            pairs = zip(site.projections, other.projections)
            return replace(site, projections=tuple(replace(part, features=like.features[:0]) for part, like in pairs))
    if any(part.features.shape[1] == 0 for part in site.projections):
        raise UnsupportedModel(
            f"{site.name} ({type(site.module).__name__}) has no heads, and no other shows how wide their gates are. Export to "
            "stock."
        )
    return site


def lay_out(site: AttentionSite, slots: Slots) -> None:
    """Rebuilds the weights of `site` with the heads of `slots`."""
    for module in (site.dispatcher, *(projection.module for projection in site.projections)):
        module.__class__ = original_class(module)  # an emptied one's class is another
    old = [(projection, projection.module.weight.detach(), bias_of(projection)) for projection in site.projections]
    old_extras = [extra.tensor.detach() for extra in site.extras]
    heads = {False: slots.query, True: slots.kv}
    for module in {id(projection.module): projection.module for projection in site.projections}.values():
        parts = [projection for projection in site.projections if projection.module is module]
        features = sum(len(heads[part.per_kv_head]) * part.features.shape[1] for part in parts)
        resize(parts[0], features)
    for extra in site.extras:
        shape = list(extra.tensor.shape)
        shape[extra.dim] = len(heads[extra.per_kv_head]) * extra.width
        setattr(extra.module, extra.attribute, like(extra.tensor, shape))
    dispatcher: Foreign = site.dispatcher
    dispatcher.head_map = slots.head_map
    adapter = adapter_of(site)
    found = adapter.site(site.name, site.module)
    if found is None:
        raise UnsupportedModel(f"{site.name} ({type(site.module).__name__}) is not recognised with other head counts.")
    for (projection, weight, bias), new in zip(old, found.projections):
        fill(new.module.weight, new.weight_dim, new.features, weight, projection.features, heads[projection.per_kv_head])
        if bias is not None:
            fill(new.module.bias, 0, new.features, bias, projection.features, heads[projection.per_kv_head])
    for extra, tensor in zip(found.extras, old_extras):
        living = [(slot, head) for slot, head in enumerate(heads[extra.per_kv_head]) if head is not None]
        here, there = (extra.features([pair[side] for pair in living]).to(tensor.device) for side in (0, 1))
        extra.tensor.index_copy_(extra.dim, here, tensor.index_select(extra.dim, there))
    adapter.after_cut(found, slots.head_map, tuple(range(len(slots.query))))
    if site.head_map.query_heads * site.value_dim != site.hidden_size:  # else it is the width of the model
        follow_width(site.module, site, slots.head_map)


def bias_of(projection: ProjectionHeads) -> Tensor | None:
    return projection.module.bias.detach() if projection.bias_per_head else None


def resize(projection: ProjectionHeads, features: int) -> None:
    """Zeros of the new size along the heads; other biases stay."""
    module = projection.module
    shape = list(module.weight.shape)
    shape[projection.weight_dim] = features
    module.weight = like(module.weight, shape)
    if projection.bias_per_head:
        module.bias = like(module.bias, [features])
    set_sizes(module, *module.weight.shape)


def like(tensor: Tensor, shape: list[int]) -> Tensor:
    zeros = tensor.detach().new_zeros(shape)
    return nn.Parameter(zeros, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else zeros


def fill(
    target: Tensor, dim: int, features: Tensor, source: Tensor, source_features: Tensor, heads: tuple[int | None, ...]
) -> None:
    """Copies to each living head of `target` what its old head has in `source`."""
    living = [(new, old) for new, old in enumerate(heads) if old is not None]
    if living:
        new, old = features[[pair[0] for pair in living]].flatten(), source_features[[pair[1] for pair in living]].flatten()
        target.data.index_copy_(dim, new.to(target.device), source.index_select(dim, old.to(source.device)).to(target))
