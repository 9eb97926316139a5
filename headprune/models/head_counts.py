"""The head counts that attention modules keep as attributes and read in their forward."""

from __future__ import annotations

import inspect

from torch import nn

from headprune.head_map import HeadMap
from headprune.models.behaviour import original_class
from headprune.models.site import AttentionSite, Foreign

QUERY_HEADS = ("num_heads", "n_heads", "n_head", "num_attention_heads", "num_query_heads")
KEY_VALUE_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "kv_heads")
ALL_QUERY_FEATURES = ("all_head_size", "inner_dim", "attn_dim", "split_size")


def set_head_counts(module: nn.Module, head_map: HeadMap, head_dim: int) -> None:
    """Sets those attributes of `module` that it has; widths that other things share (hidden_size, embed_dim) are left."""
    values = dict.fromkeys(QUERY_HEADS, head_map.query_heads)
    values |= dict.fromkeys(KEY_VALUE_HEADS, head_map.kv_heads)
    values |= dict.fromkeys(ALL_QUERY_FEATURES, head_map.query_heads * head_dim)
    for name, value in values.items():
        if isinstance(module.__dict__.get(name), int):
            setattr(module, name, value)


def follow_width(module: Foreign, site: AttentionSite, head_map: HeadMap) -> None:
    """Sets `embed_dim` where the forward reads it, which joins the heads to as many features (XGLM, MVP); others initialise by
    it."""
    original: Foreign = original_class(module)
    read = "embed_dim" in inspect.unwrap(original.forward).__code__.co_names
    if read and module.__dict__.get("embed_dim") == site.head_map.query_heads * site.value_dim:
        module.embed_dim = head_map.query_heads * site.value_dim


def counts_read(module: Foreign, head_map: HeadMap) -> dict[str, int]:
    """Head counts that the forward of `module` reads from its config at each call (Moonshine, Parakeet)."""
    original: Foreign = original_class(module)
    read = inspect.unwrap(original.forward).__code__.co_names
    counts = {"num_attention_heads": head_map.query_heads, "num_key_value_heads": head_map.kv_heads}
    return {name: count for name, count in counts.items() if name in read and name not in module.__dict__}
