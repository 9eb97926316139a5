"""T5 and its relatives: `q`, `k`, `v`, `o`, and a table of relative positions, which the first layer reads for all layers
(headprune.models.t5_positions; in LongT5's encoder headprune.models.longt5_forward) or, in UMT5, each layer for itself: there a
head's column of the table goes with it."""

from __future__ import annotations

import inspect

from headprune.head_map import HeadMap
from headprune.models.adapters import head_map_of, register_adapter
from headprune.models.behaviour import original_class
from headprune.models.head_counts import set_head_counts
from headprune.models.longt5_forward import BlockPositions, EmptiedBlocks
from headprune.models.own_positions import remember_positions
from headprune.models.quantised import weight_shape
from headprune.models.site import AttentionSite, Foreign, HeadTensor, Kind, Role, contiguous_heads
from headprune.models.specialise import empty, specialise
from headprune.models.t5_positions import EmptiedT5, SharedPositions

PARTS: dict[Role, str] = {"query": "q", "key": "k", "value": "v", "output": "o"}


class T5Like:
    name = "t5"

    def site(self, name: str, module: Foreign) -> AttentionSite | None:
        marks = (*PARTS.values(), "key_value_proj_dim", "has_relative_attention_bias", "compute_bias")
        if not all(hasattr(module, mark) for mark in marks):
            return None
        head_dim, (hidden, features) = module.key_value_proj_dim, weight_shape(module.o)
        head_map = head_map_of(module, features, features, head_dim, name)
        projections = tuple(
            contiguous_heads(role, f"{name}.{part}", getattr(module, part), head_map.query_heads, head_dim)
            for role, part in PARTS.items()
        )
        kind: Kind = "cross" if name.endswith("EncDecAttention") else "self"
        extras: tuple[HeadTensor, ...] = ()
        if module.has_relative_attention_bias and not shares_positions(module):
            table = f"{name}.relative_attention_bias"
            extras = (HeadTensor(table, module.relative_attention_bias, "weight", dim=1),)
        return AttentionSite(name, module, module, head_map, head_dim, head_dim, hidden, kind, projections, extras)

    def after_cut(self, site: AttentionSite, head_map: HeadMap, kept: tuple[int, ...]) -> None:
        set_head_counts(site.module, head_map, site.head_dim)
        if not shares_positions(site.module):
            if not head_map.query_heads:
                empty(site.module, "o")
            return
        remember_positions(site.module, site.head_map.query_heads, kept)
        in_blocks = hasattr(site.module, "block_len")
        if head_map.query_heads:
            specialise(site.module, BlockPositions if in_blocks else SharedPositions)
        else:
            empty(site.module, "o", EmptiedBlocks if in_blocks else EmptiedT5)


def shares_positions(module: Foreign) -> bool:
    """Whether its forward may be given the positions of another layer."""
    original: Foreign = original_class(module)
    return "position_bias" in inspect.signature(original.forward).parameters


register_adapter(T5Like())
