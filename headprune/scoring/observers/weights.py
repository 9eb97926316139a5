"""Observes the norms of each head's weights."""

from __future__ import annotations

import torch
from torch import Tensor

from headprune.models.site import AttentionSite, ProjectionHeads
from headprune.scoring.observations import Need
from headprune.scoring.observer import Observer, observes

ROLES = ("query", "key", "value", "output")


@observes(Need.WEIGHTS)
class WeightNorms(Observer):
    runs = "nothing"

    def found(self) -> dict[str, dict[str, Tensor]]:
        return {site.name: weight_statistics(site) for site in self.setting.sites}


def weight_statistics(site: AttentionSite) -> dict[str, Tensor]:
    """weight_l1, weight_l2, weight_count of `site`, as SiteObservations describes them."""
    per_role = [projection_statistics(site.projection(role)) for role in ROLES]
    groups = torch.tensor(site.head_map.group_sizes, dtype=torch.float32)
    kv_of_query = torch.tensor(site.head_map.kv_of_query, dtype=torch.long)
    rows = []
    for role, statistics in zip(ROLES, per_role):
        shared = role in ("key", "value")
        rows.append((statistics / groups.clamp(min=1))[:, kv_of_query] if shared else statistics)
    l1, l2, count = torch.stack(rows, dim=1)
    return {"weight_l1": l1, "weight_l2": l2, "weight_count": count}


def projection_statistics(projection: ProjectionHeads) -> Tensor:
    """fp32 [3, heads]: L1 norm, L2 norm and number of weights of each head's slice."""
    weights = projection.head_weights().flatten(1).float()
    count = torch.full((weights.shape[0],), float(weights.shape[1]), device=weights.device)
    return torch.stack([weights.abs().sum(1), weights.norm(dim=1), count]).cpu()
