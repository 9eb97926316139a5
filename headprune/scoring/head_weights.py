"""The weights of every site's heads, in one list, and what they measure given back by query head."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from headprune.errors import UnsupportedModel
from headprune.models.site import AttentionSite, Role
from headprune.ops import HeadSlices

ROLES: tuple[Role, ...] = ("query", "key", "value", "output")


def head_slices(sites: Iterable[AttentionSite]) -> list[HeadSlices]:
    """Those of every site in turn, in the order of ROLES."""
    return [slices_of(site, role) for site in sites for role in ROLES]


def slices_of(site: AttentionSite, role: Role) -> HeadSlices:
    if site.quantised is not None:
        raise UnsupportedModel(
            f"{site.quantised.name} holds quantised weights, which cannot be measured themselves; choose a criterion of gates or "
            "activations (fisher, output_energy, fluctuation, ...), or score the model before it is quantised."
        )
    if role in ("key", "value") and not site.own_keys:  # no weights of its own, so all that is measured of them is 0
        return HeadSlices(site.output.module.weight, site.output.weight_dim, site.head_map.kv_heads, ())
    one = site.projection(role)
    return HeadSlices.indexed(one.module.weight, one.features, one.weight_dim)


def weights_of(slices: Iterable[HeadSlices]) -> list[Tensor]:
    """The weights behind them, a fused one once."""
    return list({id(one.weight): one.weight for one in slices}.values())


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
