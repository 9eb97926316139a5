"""Masks over all heads of a model as one matrix, [n_masks, heads]: the heads of the first site first, then of the next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from headprune.models.site import AttentionSite


def head_counts(sites: Sequence[AttentionSite]) -> dict[str, int]:
    return {site.name: site.head_map.query_heads for site in sites}


def by_site(values: Tensor, counts: Mapping[str, int]) -> dict[str, Tensor]:
    """[n, heads of all sites] -> site -> [n, heads]."""
    return dict(zip(counts, values.split(list(counts.values()), dim=1)))


def one_out(counts: Mapping[str, int]) -> Tensor:
    """[heads, heads]: row h has all heads but h."""
    return 1 - torch.eye(sum(counts.values()))


def random_masks(counts: Mapping[str, int], number: int, keep: float, generator: torch.Generator) -> Tensor:
    """[number, heads]: each head stays with probability `keep` (Bernoulli)."""
    return (torch.rand(number, sum(counts.values()), generator=generator) < keep).float()
