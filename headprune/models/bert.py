"""BERT-like attention: `self.{query,key,value}` beside a sibling `output.dense`."""

from __future__ import annotations

from torch import nn

from headprune.head_map import HeadMap
from headprune.models.adapters import head_map_of, register_adapter
from headprune.models.emptied import empty
from headprune.models.head_counts import set_head_counts
from headprune.models.site import AttentionSite, contiguous_heads


class BertLike:
    name = "bert"

    def site(self, name: str, module: nn.Module) -> AttentionSite | None:
        inner, output = getattr(module, "self", None), getattr(module, "output", None)
        if not all(hasattr(inner, role) for role in ("query", "key", "value")) or not hasattr(output, "dense"):
            return None
        head_dim = inner.attention_head_size
        head_map = head_map_of(inner, inner.query.out_features, inner.key.out_features, head_dim, name)
        projections = tuple(
            contiguous_heads(role, f"{name}.self.{role}", getattr(inner, role), heads, head_dim)
            for role, heads in (("query", head_map.query_heads), ("key", head_map.kv_heads), ("value", head_map.kv_heads))
        )
        dense = contiguous_heads("output", f"{name}.output.dense", output.dense, head_map.query_heads, head_dim)
        kind = "cross" if "Cross" in type(inner).__name__ else "self"
        return AttentionSite(
            name, module, inner, head_map, head_dim, head_dim, output.dense.out_features, kind, (*projections, dense)
        )

    def after_cut(self, site: AttentionSite, head_map: HeadMap, kept: tuple[int, ...]) -> None:
        set_head_counts(site.dispatcher, head_map, site.head_dim)
        if not head_map.query_heads:
            empty(site.dispatcher, None)


register_adapter(BertLike())
