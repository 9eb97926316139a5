"""What a model costs by count: parameters, attention FLOPs, key/value cache."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from headprune.models.site import AttentionSite


def count_parameters(model: nn.Module) -> int:
    """Distinct parameters of the whole model."""
    return sum(parameter.numel() for parameter in model.parameters())


def attention_flops(sites: Sequence[AttentionSite], tokens: int) -> int:
    """FLOPs (2 per multiply-add) of all self-attentions on one sequence of `tokens`: the four projections, and QK^T and PV
    without a causal discount; softmax and biases are not counted."""
    total = 0
    for site in sites:
        queries, kv = site.head_map.query_heads, site.head_map.kv_heads
        projected = queries * (site.head_dim + site.value_dim) + kv * (site.head_dim + site.value_dim)
        total += 2 * tokens * site.hidden_size * projected + 2 * tokens * tokens * queries * (site.head_dim + site.value_dim)
    return total


def kv_cache_bytes_per_token(sites: Sequence[AttentionSite], bytes_per_value: int = 4) -> int:
    """Bytes that one token adds to the key/value cache, as the model itself fills it."""
    return sum(site.cache.of(site.head_map) for site in sites) * bytes_per_value
