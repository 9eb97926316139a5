"""Observes the size of each head's weights, all projections of the model in one call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from headprune.models.site import AttentionSite, ProjectionHeads
from headprune.ops import HeadSlices, WeightStats, head_weight_stats
from headprune.scoring.observations import Need
from headprune.scoring.observer import Observer, Setting, observes

ROLES = ("query", "key", "value", "output")


@observes(Need.WEIGHTS)
class WeightNorms(Observer):
    runs = "nothing"

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self._projections = tuple(projections_of(site) for site in setting.sites)

    def found(self) -> dict[str, dict[str, Tensor]]:
        stats = iter(head_weight_stats([slices_of(one) for site in self._projections for one in site]))
        return {site.name: by_query_head(site, [next(stats) for _ in ROLES]) for site in self.setting.sites}


def projections_of(site: AttentionSite) -> list[ProjectionHeads]:
    """In the order of ROLES."""
    return [site.projection(role) for role in ROLES]


def slices_of(projection: ProjectionHeads) -> HeadSlices:
    return HeadSlices.indexed(projection.module.weight, projection.features, projection.weight_dim)


def by_query_head(site: AttentionSite, stats: Sequence[WeightStats]) -> dict[str, Tensor]:
    """The fields of Need.WEIGHTS; `stats` in the order of ROLES."""
    return {
        "weight_l1": rows_of(site, [one.l1 for one in stats]),
        "weight_l2": rows_of(site, [one.l2 for one in stats]),
        "weight_max": rows_of(site, [one.max for one in stats], shares=False),
        "weight_count": rows_of(site, [one.count for one in stats]),
    }


def rows_of(site: AttentionSite, values: Sequence[Tensor], shares: bool = True) -> Tensor:
    """fp32 [4, query_heads] on the CPU: each query head's own value in query and output, its key/value head's in key and value;
    with `shares` the latter divided evenly over the group."""
    groups = torch.tensor(site.head_map.group_sizes, dtype=torch.float32, device="cpu").clamp(min=1)
    kv_of_query = torch.tensor(site.head_map.kv_of_query, dtype=torch.long, device="cpu")
    rows = []
    for role, value in zip(ROLES, values):
        value = value.float().cpu()
        if role in ("key", "value"):
            value = (value / groups if shares else value)[kv_of_query]
        rows.append(value)
    return torch.stack(rows)
