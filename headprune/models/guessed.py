"""Attention that no adapter knows, recognised by what it is made of: one linear layer each for query, key, value and output
under usual names, a head count, and nothing else that could belong to heads. It is cut only where a forward pass proves it."""

from __future__ import annotations

from torch import nn

from headprune.head_map import HeadMap
from headprune.models.adapters import head_map_of, named_as_attention, register_adapter
from headprune.models.behaviour import original_class
from headprune.models.head_counts import QUERY_HEADS, follow_width, set_head_counts
from headprune.models.layer_config import follow_groups
from headprune.models.quantised import weight_shape
from headprune.models.site import AttentionSite, Foreign, Role, contiguous_heads
from headprune.models.specialise import empty

NAMES: dict[Role, tuple[str, ...]] = {
    "query": ("q_proj", "query", "q", "wq", "w_q", "q_lin", "query_proj", "to_q"),
    "key": ("k_proj", "key", "k", "wk", "w_k", "k_lin", "key_proj", "to_k"),
    "value": ("v_proj", "value", "v", "wv", "w_v", "v_lin", "value_proj", "to_v"),
    "output": ("o_proj", "out_proj", "o", "wo", "w_o", "out_lin", "dense", "proj", "out", "output_proj", "c_proj"),
}


class Guessed:
    name = "guessed"
    guesses = True

    def site(self, name: str, module: Foreign) -> AttentionSite | None:
        parts = parts_of(module) if named_as_attention(module) else None
        if parts is None:
            return None
        linear = {role: getattr(module, part) for role, part in parts.items()}
        if not isinstance(getattr(module, "head_map", None), HeadMap):
            heads = next((count for count in QUERY_HEADS if isinstance(module.__dict__.get(count), int)), None)
            if heads is None or not getattr(module, heads) or linear["output"].in_features % getattr(module, heads):
                return None
            head_dim = linear["output"].in_features // getattr(module, heads)
        else:
            head_dim = module.headprune_head_dim
        rows = {role: weight_shape(layer)[int(role == "output")] for role, layer in linear.items()}
        head_map = head_map_of(module, rows["output"], rows["value"], head_dim, name)
        queries, keys = head_map.query_heads, head_map.kv_heads
        many: dict[Role, int] = {"query": queries, "key": keys, "value": keys, "output": queries}
        projections = tuple(
            contiguous_heads(role, f"{name}.{parts[role]}", layer, many[role], head_dim) for role, layer in linear.items()
        )
        hidden = linear["output"].out_features
        return AttentionSite(name, module, module, head_map, head_dim, head_dim, hidden, "self", projections, proven=False)

    def after_cut(self, site: AttentionSite, head_map: HeadMap, kept: tuple[int, ...]) -> None:
        module: Foreign = site.module
        module.headprune_head_dim = site.head_dim
        set_head_counts(module, head_map, site.head_dim)
        follow_width(module, site, head_map)
        if hasattr(module, "config"):
            follow_groups(module, head_map)
        if not head_map.query_heads:
            empty(module, site.output.name.rpartition(".")[2])


def parts_of(module: Foreign) -> dict[Role, str] | None:
    """Role -> child; None unless the plain linear children are exactly one of each role and the module has no parameter of
    its own."""
    linear = [name for name, child in module.named_children() if getattr(child, "weight", None) is not None]
    found = {role: [name for name in linear if name in names] for role, names in NAMES.items()}
    plain = len(linear) == 4 and all(original_class(getattr(module, name)) is nn.Linear for name in linear)
    if not plain or any(len(names) != 1 for names in found.values()) or list(module.parameters(recurse=False)):
        return None
    return {role: names[0] for role, names in found.items()}


register_adapter(Guessed())
