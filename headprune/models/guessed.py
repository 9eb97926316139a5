"""Attention that no adapter knows, recognised by what it is made of: plain linear layers under usual names, one each for query,
key, value and output or one for the first three together, a head count, and nothing else that could belong to heads. It is cut
only where a forward pass proves it."""

from __future__ import annotations

from torch import nn

from headprune.head_map import HeadMap
from headprune.models.adapters import head_map_of, named_as_attention, register_adapter
from headprune.models.behaviour import original_class
from headprune.models.emptied_form import empty_alike
from headprune.models.fused_layout import blocks
from headprune.models.head_counts import QUERY_HEADS, follow_width, set_head_counts
from headprune.models.layer_config import follow_groups
from headprune.models.quantised import weight_shape
from headprune.models.site import AttentionSite, Foreign, Kind, ProjectionHeads, Role, at, contiguous_heads

NAMES: dict[str, tuple[str, ...]] = {
    "query": ("q_proj", "query", "q", "wq", "w_q", "q_lin", "query_proj", "to_q"),
    "key": ("k_proj", "key", "k", "wk", "w_k", "k_lin", "key_proj", "to_k"),
    "value": ("v_proj", "value", "v", "wv", "w_v", "v_lin", "value_proj", "to_v"),
    "fused": ("qkv", "qkv_proj", "c_attn", "in_proj", "to_qkv", "Wqkv", "wqkv", "w_qkv", "qkv_linear"),
    "output": (
        "o_proj", "out_proj", "o", "wo", "w_o", "out_lin", "dense", "proj", "out", "output_proj", "c_proj", "to_out", "Wo",
    ),
}  # fmt: skip
SEPARATE, FUSED = {"query", "key", "value", "output"}, {"fused", "output"}
MORE_HEADS = ("heads", "nheads", "nhead", "h")  # what else a head count is called in code of one's own


class Guessed:
    """A fused projection holds all queries, then all keys, then all values. Of a container (Linear, Dropout) the linear layer
    counts that comes first."""

    name = "guessed"
    guesses = True

    def site(self, name: str, module: Foreign) -> AttentionSite | None:
        parts = parts_of(module) if named_as_attention(module) else None
        if parts is None:
            return None
        out = at(module, parts["output"])
        if not isinstance(getattr(module, "head_map", None), HeadMap):
            heads = next((getattr(module, count) for count in counts_of(module)), 0)
            if not heads or out.in_features % heads:
                return None
            head_dim = out.in_features // heads
        else:
            head_dim = module.headprune_head_dim
        keys = kv_features(module, parts, out.in_features)
        head_map = head_map_of(module, out.in_features, keys, head_dim, name)
        projections = (
            *inputs(name, module, parts, head_map, head_dim),
            contiguous_heads("output", f"{name}.{parts['output']}", out, head_map.query_heads, head_dim),
        )
        kind: Kind = "cross" if getattr(module, "is_cross_attention", False) else "self"  # as in diffusers
        return AttentionSite(name, module, module, head_map, head_dim, head_dim, out.out_features, kind, projections, proven=False)

    def after_cut(self, site: AttentionSite, head_map: HeadMap, kept: tuple[int, ...]) -> None:
        module: Foreign = site.dispatcher
        module.headprune_head_dim = site.head_dim
        for count in counts_of(module):
            setattr(module, count, head_map.query_heads)
        set_head_counts(module, head_map, site.head_dim)
        follow_width(module, site, head_map)
        if hasattr(module, "config"):
            follow_groups(module, head_map)
        if not head_map.query_heads:
            self.empty(module, site.output.name.removeprefix(f"{site.name}.").partition(".")[0])

    def empty(self, module: Foreign, output: str) -> None:
        """Makes `module`, which has no head any more, return as much as it did with heads. output: its output projection."""
        empty_alike(module, output)


def inputs(name: str, module: Foreign, parts: dict[str, str], head_map: HeadMap, head_dim: int) -> tuple[ProjectionHeads, ...]:
    if "fused" in parts:
        return blocks(f"{name}.{parts['fused']}", at(module, parts["fused"]), head_map, head_dim)
    many: tuple[tuple[Role, int], ...] = (
        ("query", head_map.query_heads), ("key", head_map.kv_heads), ("value", head_map.kv_heads),
    )  # fmt: skip
    return tuple(contiguous_heads(role, f"{name}.{parts[role]}", at(module, parts[role]), heads, head_dim) for role, heads in many)


def kv_features(module: Foreign, parts: dict[str, str], query_features: int) -> int:
    if "fused" in parts:
        return (weight_shape(at(module, parts["fused"]))[0] - query_features) // 2
    return weight_shape(at(module, parts["value"]))[0]


def counts_of(module: nn.Module) -> list[str]:
    """The attributes of `module` that hold its number of query heads."""
    return [count for count in (*QUERY_HEADS, *MORE_HEADS) if isinstance(module.__dict__.get(count), int)]


def parts_of(module: Foreign) -> dict[str, str] | None:
    """Role -> path of its linear layer; None unless the children with weights are exactly one of each role and the module has no
    parameter of its own."""
    holding = {name: first_linear(name, child) for name, child in module.named_children() if any(True for _ in child.parameters())}
    found = {role: [path for name, path in holding.items() if name in names] for role, names in NAMES.items()}
    roles = {role for role, paths in found.items() if paths}
    alone = all(len(found[role]) == 1 for role in roles) and len(holding) == len(roles)
    if roles not in (SEPARATE, FUSED) or not alone or list(module.parameters(recurse=False)):
        return None
    paths = {role: found[role][0] for role in roles}
    return None if any(path is None for path in paths.values()) else {role: str(path) for role, path in paths.items()}


def first_linear(name: str, child: nn.Module) -> str | None:
    """`name` where `child` is a plain linear layer, or the place of the one that is first in it and alone has weights."""
    if original_class(child) is nn.Linear:
        return name
    first = next(iter(child.children()), None) if isinstance(child, (nn.Sequential, nn.ModuleList)) else None
    alone = (
        first is not None and original_class(first) is nn.Linear and len(list(child.parameters())) == len(list(first.parameters()))
    )
    return f"{name}.0" if alone else None


register_adapter(Guessed())
