"""Attention rows of a tiny model by its own eager attention, and the statistics of them as loops."""

import math

import torch

from headprune.models import attention_sites


def eager_attentions(model, batch) -> dict[str, torch.Tensor]:
    """Site name -> [batch, query_heads, query_len, kv_len], fp64 weights of transformers' eager attention."""
    implementation = model.config._attn_implementation
    model.set_attn_implementation("eager")
    with torch.no_grad():
        found = model(**batch, output_attentions=True).attentions
    model.set_attn_implementation(implementation)
    return {site.name: weights.double() for site, weights in zip(attention_sites(model), found)}


def row_means(weights: torch.Tensor, mask: torch.Tensor, value) -> torch.Tensor:
    """[batch, heads]: mean over valid rows of value(row [kv_len], query)."""
    batch, heads, length, _ = weights.shape
    found = torch.zeros(batch, heads, dtype=torch.float64)
    for sample in range(batch):
        rows = [query for query in range(length) if mask[sample, query]]
        for head in range(heads):
            found[sample, head] = sum(float(value(weights[sample, head, query], query)) for query in rows) / len(rows)
    return found


def entropy(row, query) -> float:
    return -sum(p * math.log(p) for p in row.tolist() if p > 0)


def divergence(first, second) -> float:
    """Jensen-Shannon divergence of two rows."""
    return entropy((first + second) / 2, 0) - (entropy(first, 0) + entropy(second, 0)) / 2
