"""Multi-head latent attention (DeepSeek v2, v3 and what is built like them): heads live in q_b_proj (or q_proj), kv_b_proj and
o_proj; the compressed latents that the cache holds belong to no head and stay."""

from __future__ import annotations

from headprune.head_map import HeadMap
from headprune.models.adapters import head_map_of, register_adapter
from headprune.models.cached import CachedFeatures
from headprune.models.head_counts import set_head_counts
from headprune.models.layer_config import follow_groups
from headprune.models.quantised import weight_shape
from headprune.models.site import AttentionSite, Foreign, check_filled, check_projection, contiguous_heads, heads_at
from headprune.models.specialise import empty

SIZES = ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
MARKS = ("kv_b_proj", "o_proj", "kv_lora_rank", "expand_kv", *SIZES)  # expand_kv: after the cache, so that it holds latents
QUERIES = ("q_b_proj", "q_proj")  # the first is None where queries are not compressed


class Latent:
    """Each query head has a key/value head of its own, as in plain multi-head attention."""

    name = "latent"

    def site(self, name: str, module: Foreign) -> AttentionSite | None:
        if not all(hasattr(module, part) for part in MARKS):
            return None
        query = next((part for part in QUERIES if getattr(module, part, None) is not None), None)
        if query is None:
            return None
        nope, rope, value = (getattr(module, size) for size in SIZES)
        check_projection(f"{name}.o_proj", module.o_proj)
        hidden, features = weight_shape(module.o_proj)
        head_map = head_map_of(module, features, features, value, name)
        heads = head_map.query_heads
        q = contiguous_heads("query", f"{name}.{query}", getattr(module, query), heads, nope + rope)
        path, both = f"{name}.kv_b_proj", module.kv_b_proj
        k = heads_at("key", path, both, heads, nope, 0, nope + value)
        v = heads_at("value", path, both, heads, value, nope, nope + value)
        check_filled(k, v)
        o = contiguous_heads("output", f"{name}.o_proj", module.o_proj, heads, value)
        cached = CachedFeatures(shared=module.kv_lora_rank + rope)
        return AttentionSite(name, module, module, head_map, nope + rope, value, hidden, "self", (q, k, v, o), cached=cached)

    def after_cut(self, site: AttentionSite, head_map: HeadMap, kept: tuple[int, ...]) -> None:
        set_head_counts(site.module, head_map, site.head_dim)
        follow_groups(site.module, head_map)
        if not head_map.query_heads:
            empty(site.module, "o_proj")


register_adapter(Latent())
