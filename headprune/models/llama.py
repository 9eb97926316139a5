"""Llama-like attention: `q_proj`, `k_proj`, `v_proj`, `o_proj` in one module, with grouped key/value heads."""

from __future__ import annotations

from torch import nn

from headprune.errors import UnsupportedModel
from headprune.head_map import HeadMap
from headprune.models.adapters import head_map_of, register_adapter
from headprune.models.site import AttentionSite, contiguous_heads

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


class LlamaLike:
    name = "llama"

    def site(self, name: str, module: nn.Module) -> AttentionSite | None:
        if not all(hasattr(module, projection) for projection in (*PROJECTIONS, "head_dim", "num_key_value_groups")):
            return None
        head_dim, q, k, o = module.head_dim, module.q_proj, module.k_proj, module.o_proj
        norm = getattr(getattr(module, "q_norm", None), "weight", None)
        if norm is not None and norm.shape != (head_dim,):
            raise UnsupportedModel(
                f"{name}.q_norm spans {norm.numel()} features, not one head of {head_dim}: removing a head changes the "
                "statistic that all the others are divided by, so cutting would differ from gating."
            )
        if hasattr(module, "sinks"):
            raise UnsupportedModel(f"{name} has attention sinks, which belong to single heads; that layout is not known yet.")
        head_map = head_map_of(module, q.weight.shape[0], k.weight.shape[0], head_dim, name)
        heads = {
            "query": head_map.query_heads,
            "key": head_map.kv_heads,
            "value": head_map.kv_heads,
            "output": head_map.query_heads,
        }
        projections = tuple(
            contiguous_heads(role, f"{name}.{projection}", getattr(module, projection), heads[role], head_dim)
            for role, projection in zip(("query", "key", "value", "output"), PROJECTIONS)
        )
        return AttentionSite(name, module, module, head_map, head_dim, head_dim, o.weight.shape[0], "self", projections)

    def after_cut(self, site: AttentionSite, head_map: HeadMap) -> None:
        # Stock attention functions read the group size here; a ragged layer has none, and they refuse it.
        site.dispatcher.num_key_value_groups = head_map.group_sizes[0] if head_map.is_uniform else None


register_adapter(LlamaLike())
