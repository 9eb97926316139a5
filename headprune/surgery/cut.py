"""Cuts heads out of the weights, in place: the model stays an ordinary dense model, only smaller."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from headprune.errors import InvalidPlan, UnsupportedModel
from headprune.models import attention_interface
from headprune.models.adapters import adapter_of, attention_sites
from headprune.models.gating import checked_keep
from headprune.models.site import AttentionSite, ProjectionHeads
from headprune.surgery.record import record_cut


def cut(model: nn.Module, keep: Mapping[str, Sequence[int]]) -> None:
    """Removes all query heads but those in `keep` (site name -> heads; sites left out keep all), in place.

    A key/value head goes with the last query head that reads it. dtype, device and requires_grad stay; where groups become
    ragged the model is switched to attn_implementation="headprune", which is the only one that runs them.

    Raises InvalidPlan where a site would lose all its heads, UnsupportedModel where ragged groups cannot be run; the model
    is untouched then.
    """
    sites = {site.name: site for site in attention_sites(model)}
    kept = checked_keep(sites, keep)
    emptied = [name for name, heads in kept.items() if not heads and sites[name].head_map.query_heads]
    if emptied:
        raise InvalidPlan(f"{emptied[0]} would lose all its heads; keep at least one in every attention.")
    if any(
        not site.head_map.keep(kept.get(name, range(site.head_map.query_heads))).is_uniform
        for name, site in sites.items()
        if not getattr(adapter_of(site), "runs_ragged", False)
    ):
        use_headprune_attention(model)
    for name, heads in kept.items():
        cut_site(sites[name], heads)
    record_cut(model, sites, kept)


def cut_site(site: AttentionSite, kept: tuple[int, ...]) -> None:
    head_map = site.head_map.keep(kept)
    adapter = adapter_of(site)
    if hasattr(adapter, "cut"):
        adapter.cut(site, kept)
        return
    kept_kv = site.head_map.kept_kv_heads(kept)
    by_module: dict[int, list[tuple[ProjectionHeads, Tensor]]] = {}
    for projection in site.projections:
        heads = kept_kv if projection.per_kv_head else kept
        features = projection.features[list(heads)].flatten()
        by_module.setdefault(id(projection.module), []).append((projection, features))
    for parts in by_module.values():
        # Fused projections keep their layout: the features that stay, in their old order.
        keep_features(parts[0][0], torch.cat([features for _, features in parts]).sort().values)
    site.dispatcher.head_map = head_map
    adapter.after_cut(site, head_map)


def keep_features(projection: ProjectionHeads, features: Tensor) -> None:
    """Slices the projection's weight (and bias, where it lies along the heads) to `features`."""
    module, dim = projection.module, projection.weight_dim
    module.weight = sliced(module.weight, dim, features)
    if projection.bias_per_head:
        module.bias = sliced(module.bias, 0, features)
    set_sizes(module, *module.weight.shape)


def sliced(parameter: nn.Parameter, dim: int, features: Tensor) -> nn.Parameter:
    data = parameter.detach().index_select(dim, features.to(parameter.device))
    return nn.Parameter(data, requires_grad=parameter.requires_grad)


def set_sizes(module: nn.Module, rows: int, columns: int) -> None:
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = rows, columns
    else:  # transformers' Conv1D, weight [in, out]
        module.nx, module.nf = rows, columns


def use_headprune_attention(model: nn.Module) -> None:
    if not hasattr(model, "set_attn_implementation"):
        raise UnsupportedModel(
            f"{type(model).__name__} cannot run ragged groups: it has no attention interface. "
            'Plan with granularity="kv_group", which keeps groups equal.'
        )
    model.set_attn_implementation(attention_interface.NAME)
    if model.config._attn_implementation != attention_interface.NAME:
        raise UnsupportedModel(
            f"{type(model).__name__} does not dispatch its attention, so ragged groups cannot run. "
            'Plan with granularity="kv_group", which keeps groups equal.'
        )
