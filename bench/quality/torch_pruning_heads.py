"""Torch-Pruning's own head pruning (pip torch-pruning, Fang et al. 2023), run on its terms."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from quality.methods import Method, Planned, Refused, Setting, register
from torch import Tensor, nn

import headprune as hp
from headprune.models import AttentionSite, attention_sites

ROLES = ("query", "key", "value")


def torch_pruning() -> Any:
    """The package, or Refused."""
    try:
        import torch_pruning
    except ImportError:
        raise Refused("torch-pruning is not installed: pip install torch-pruning") from None
    return torch_pruning


def weights_with_gradients(setting: Setting, observed: Any = None) -> nn.Module:
    """A copy of the model whose weights hold the gradient of the loss, summed over the calibration batches' means."""
    torch_pruning()
    model = copy.deepcopy(setting.model).eval()
    model.set_attn_implementation("eager")  # its graph follows autograd's nodes, and knows those
    repeat_shared_heads(model)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    for batch in setting.task.calibration:
        setting.task.loss(model, batch).mean().backward()
    return model


@torch.no_grad()
def repeat_shared_heads(model: nn.Module) -> None:
    """A key/value head for each query head, as copies: its walk through the graph of a grouped model does not end."""
    for site in attention_sites(model):
        if site.head_map.kv_heads == site.head_map.query_heads:
            continue
        for role in ("key", "value"):
            projection = site.projection(role)
            module, rows = projection.module, projection.features[list(site.head_map.kv_of_query)].flatten()
            module.weight = nn.Parameter(module.weight[rows].clone())
            if module.bias is not None:
                module.bias = nn.Parameter(module.bias[rows].clone())
            module.out_features = len(rows)
        site.dispatcher.num_key_value_groups = 1
        model.config.num_key_value_heads = model.config.num_attention_heads


def head_pruner(model: nn.Module, inputs: dict[str, Tensor], fraction: float) -> Any:
    """Its pruner over the heads alone: one ranking over the model by its Taylor importance, everything else left as it is.

    pruning_ratio is what it would take of head_dim, which prune_head_dims=False forbids; with 0 it looks at no heads either.
    """
    tp, sites = torch_pruning(), attention_sites(model)
    heads = {}
    for site in sites:
        for role in ROLES:
            module = site.projection(role).module
            heads[module] = site.head_map.query_heads if role == "query" else site.head_map.kv_heads
    total = sum(site.head_map.query_heads for site in sites)
    ratio = (int(fraction * total + 1e-9) - 0.01) / total  # else its rounding removes one more than asked
    others = [module for module in model.modules() if isinstance(module, nn.Linear) and module not in heads]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return tp.pruner.BasePruner(
            model, inputs, tp.importance.GroupTaylorImportance(), global_pruning=True, pruning_ratio=0.5,
            head_pruning_ratio=ratio, num_heads=heads, prune_num_heads=True, prune_head_dims=False, ignored_layers=others,
            root_module_types=[nn.Linear], output_transform=first_output,
        )  # fmt: skip


def first_output(output: Any) -> Tensor:
    return output[0]


def cut_by_torch_pruning(setting: Setting, scored: nn.Module, fraction: float) -> Planned:
    model = copy.deepcopy(scored)
    for old, new in zip(scored.parameters(), model.parameters()):
        new.grad = old.grad.clone() if old.grad is not None else None
    sites = attention_sites(model)
    pruner = head_pruner(
        model, {name: rows[:2] for name, rows in setting.task.calibration[0].items()} | {"use_cache": False}, fraction
    )
    keep = {site.name: set(range(site.head_map.query_heads)) for site in sites}
    owners = {site.projection("query").module: site for site in sites}
    for group in pruner.step(interactive=True):
        for dependency, features in group:
            site = owners.get(dependency.target.module)
            if site is not None and pruner.DG.is_out_channel_pruning_fn(dependency.handler):
                keep[site.name] -= {feature // site.head_dim for feature in features}
        group.prune()
    kept = hp.PruningPlan.from_keep(setting.model, {name: tuple(sorted(heads)) for name, heads in keep.items()})
    tell_head_counts(sites)
    grouped = any(site.head_map.kv_heads != site.head_map.query_heads for site in attention_sites(setting.model))
    note = "one ranking over all layers, cut by Torch-Pruning itself"
    return Planned(kept, model, f"{note}; key/value heads repeated first, one for each query head" if grouped else note)


def tell_head_counts(sites: tuple[AttentionSite, ...]) -> None:
    """Sets what a layer's forward pass reads of its head count; Torch-Pruning leaves that to the user."""
    for site in sites:
        heads = site.projection("query").module.out_features // site.head_dim
        for attribute, value in {"num_attention_heads": heads, "all_head_size": heads * site.head_dim}.items():
            if hasattr(site.dispatcher, attribute):
                setattr(site.dispatcher, attribute, value)


def its_model(setting: Setting, scored: Any, planned: Planned, model: nn.Module) -> nn.Module:
    for parameter in planned.model.parameters():
        parameter.grad = None
        parameter.requires_grad_(False)
    return planned.model


register(
    Method(
        "torch-pruning", "Torch-Pruning", "pip torch-pruning: its group Taylor importance and prune_num_heads, no compensation",
        weights_with_gradients, cut_by_torch_pruning, its_model,
    )
)  # fmt: skip
