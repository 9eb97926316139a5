"""How far two rankings of the same heads agree."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from headprune.errors import InvalidInput


@dataclass(frozen=True)
class Agreement:
    """spearman: rank correlation over all heads of the model; by_site: within each site (NaN where all of its heads tie);
    overlap: the share of the heads kept by one that the other keeps too, where each keeps the best `keep` of all heads."""

    spearman: float
    by_site: dict[str, float]
    overlap: float
    keep: float

    def __str__(self) -> str:
        return f"Spearman {self.spearman:.3f} over all heads; of the best {self.keep:.0%}, {self.overlap:.0%} are the same"


def agreement(first: Mapping[str, Tensor], second: Mapping[str, Tensor], keep: float = 0.5) -> Agreement:
    """Compares scores of the same sites. Raises InvalidInput unless 0 < keep <= 1."""
    if not 0 < keep <= 1:
        raise InvalidInput(f"keep is {keep}; expected a fraction of the heads, above 0 and at most 1.")
    mine, theirs = (torch.cat([torch.zeros(0), *(scores[name] for name in first)]) for scores in (first, second))
    count = max(1, round(keep * len(mine)))
    same = set(mine.topk(count).indices.tolist()) & set(theirs.topk(count).indices.tolist()) if len(mine) else ()
    by_site = {name: spearman(first[name], second[name]) for name in first}
    return Agreement(spearman(mine, theirs), by_site, len(same) / count, keep)


def spearman(first: Tensor, second: Tensor) -> float:
    """Rank correlation of two vectors, ties by their mean rank; NaN where one of them is constant (Spearman 1904)."""
    ranks = torch.stack([mean_ranks(first), mean_ranks(second)])
    ranks = ranks - ranks.mean(dim=1, keepdim=True)
    scale = ranks.norm(dim=1).prod()
    return float((ranks[0] @ ranks[1]) / scale) if scale > 0 else float("nan")


def mean_ranks(values: Tensor) -> Tensor:
    """[n], fp64: the place of each value in ascending order; equal values share the mean of their places."""
    _, place, count = values.unique(return_inverse=True, return_counts=True)
    last = count.cumsum(0)
    ranks: Tensor = (last - (count - 1) / 2).double()
    return ranks[place]
