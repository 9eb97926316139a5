"""Models whose last layers have no keys and values of their own and read those of an earlier layer of the same kind (Gemma 3n,
Gemma 4: `num_kv_shared_layers`).

A layer that reads them loses query heads alone. One that gives them keeps all its key/value heads, whichever of its own query heads
go: the cut of one layer does not know what the others read.
"""

from __future__ import annotations

from dataclasses import replace
from inspect import signature, unwrap

from torch import nn

from headprune.head_map import HeadMap
from headprune.kv_sharing import ARGUMENT, gives_keys, reads_keys
from headprune.models.adapters import register_adapter
from headprune.models.behaviour import original_class
from headprune.models.cached import CachedFeatures
from headprune.models.emptied_sharing import EmptiedGiver, EmptiedReader
from headprune.models.head_counts import set_head_counts
from headprune.models.layer_config import follow_groups
from headprune.models.quantised import weight_shape
from headprune.models.separate import BESIDES, Separate, unknown_parameters
from headprune.models.site import AttentionSite, Foreign, contiguous_heads
from headprune.models.specialise import empty

UNUSED = ("k_proj", "v_proj")  # that a layer may hold though it reads others' keys and values


class GivesKeys(Separate):
    """A layer that also reads them itself: like any other but for its key/value heads, which stay."""

    name = "gives_keys"
    emptied = EmptiedGiver

    def site(self, name: str, module: Foreign) -> AttentionSite | None:
        found = self.laid_out(name, module) if gives_keys(module) and hands_over(module) else None
        return None if found is None else replace(found, head_map=replace(found.head_map, kv_stay=True))


class ReadsKeys:
    """q_proj and o_proj alone."""

    name = "reads_keys"

    def site(self, name: str, module: Foreign) -> AttentionSite | None:
        there = all(isinstance(getattr(module, part, None), nn.Module) for part in ("q_proj", "o_proj"))
        known = there and isinstance(getattr(module, "head_dim", None), int)
        if not known or not reads_keys(module) or not hands_over(module):
            return None
        head_dim, o = module.head_dim, module.o_proj
        head_map = getattr(module, "head_map", None)
        if not isinstance(head_map, HeadMap):
            heads = weight_shape(o)[1] // head_dim
            head_map = replace(HeadMap.uniform(heads, heads // module.num_key_value_groups), kv_stay=True)
        projections = (
            contiguous_heads("query", f"{name}.q_proj", module.q_proj, head_map.query_heads, head_dim),
            contiguous_heads("output", f"{name}.o_proj", o, head_map.query_heads, head_dim),
        )
        return AttentionSite(
            name, module, module, head_map, head_dim, head_dim, weight_shape(o)[0], "self", projections,
            proven=not unknown_parameters(module, {"q_proj", "o_proj", *UNUSED, *BESIDES}), cached=CachedFeatures(), own_keys=False,
        )  # fmt: skip

    def after_cut(self, site: AttentionSite, head_map: HeadMap, kept: tuple[int, ...]) -> None:
        set_head_counts(site.module, head_map, site.head_dim)
        follow_groups(site.module, head_map)
        if not head_map.query_heads:
            empty(site.module, "o_proj", EmptiedReader)


def hands_over(module: nn.Module) -> bool:
    """Whether keys and values go from layer to layer as an argument of its forward, which an attention without heads counts on."""
    kind: Foreign = original_class(module)
    return ARGUMENT in signature(unwrap(kind.forward)).parameters


register_adapter(GivesKeys())
register_adapter(ReadsKeys())
