"""Cuts heads out of the weights, in place: the model stays an ordinary dense model, only smaller."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from headprune.arguments import check_arguments
from headprune.attention_interface import NAME
from headprune.errors import InvalidPlan, UnsupportedModel
from headprune.models.adapters import adapter_of, attention_sites
from headprune.models.gating import checked_keep
from headprune.models.site import AttentionSite, Foreign, HeadModules, ProjectionHeads, is_conv1d
from headprune.models.specialise import empty_projection
from headprune.models.streamed import refuse_streamed
from headprune.nn.replace import on_own_attention
from headprune.nn.weights import UNDO
from headprune.surgery.gather import gathered, gathered_at_once
from headprune.surgery.record import record_cut, refuse_other_record
from headprune.surgery.rehearse import rehearse
from headprune.surgery.saved_with_code import save_with_code
from headprune.surgery.stand_in import on_stand_ins


@dataclass(frozen=True)
class CheckedCut:
    """A cut that has passed every check: all sites of the model, and of those that lose heads what is kept."""

    sites: dict[str, AttentionSite]
    kept: dict[str, tuple[int, ...]]

    @cached_property
    def ragged(self) -> list[AttentionSite]:
        """The sites that will have groups of different sizes and count on the model's attention function for them."""
        left = {
            name: site.head_map.keep(self.kept.get(name, range(site.head_map.query_heads))) for name, site in self.sites.items()
        }
        return [
            site
            for name, site in self.sites.items()
            if not left[name].is_uniform and not getattr(adapter_of(site), "runs_ragged", False)
        ]


@on_own_attention
def cut(
    model: nn.Module,
    keep: Mapping[str, Sequence[int]],
    *,
    verify: bool = True,
    run: Callable[[nn.Module], Any] | None = None,
    proven: bool = False,
) -> None:
    """Removes all query heads but those in `keep` (site name -> heads; sites left out keep all), in place.

    A key/value head goes with the last query head that reads it; an attention without heads adds its output bias alone.
    dtype, device and requires_grad stay; where groups become ragged the model is switched to
    attn_implementation="headprune", which runs them without expanding keys and values (others still may be set). Each
    torch.nn.MultiheadAttention becomes a VariableHeadAttention.

    Args:
        verify: first try each cut on a small input and compare with gating, in fp32 (headprune.surgery.rehearse). An attention
            that no input reaches is refused, unless it is of a kind that the tests cover: then the log names it.
        run: one forward pass of the model for that; default a few random tokens, pixels or sounds, where the model takes such.
        proven: this cut of this kind of model was tried before (a saved folder): nothing is tried, of unknown attentions either.

    Raises InvalidPlan where nothing would be left, UnsupportedModel where an attention cannot be cut exactly; the model is
    untouched then.
    """
    check_arguments(cut, {"verify": verify, "run": run, "proven": proven})
    carry_out(model, checked_cut(model, keep, verify=verify, run=run, proven=proven))


def checked_cut(
    model: nn.Module,
    keep: Mapping[str, Sequence[int]],
    *,
    verify: bool = True,
    run: Callable[[nn.Module], Any] | None = None,
    proven: bool = False,
    otherwise: Callable[[nn.Module], Any] | None = None,
) -> CheckedCut:
    """All that can go wrong with a cut, found before anything is changed. Arguments and errors: see `cut`.

    otherwise: another forward pass, made where `run` or its default does not reach every site.
    """
    sites = {site.name: site for site in attention_sites(model)}
    refuse_other_record(model, sites)
    refuse_streamed(model, "where a cut in memory does not change them", "prune its folder: hp.prune_folder, or --streamed")
    kept = checked_keep(sites, keep)
    if not any(len(kept.get(name, range(site.head_map.query_heads))) for name, site in sites.items()):
        raise InvalidPlan("every head of every attention would go; keep at least one in the model.")
    changed = {name: heads for name, heads in kept.items() if len(heads) < sites[name].head_map.query_heads}
    checked = CheckedCut(sites, changed)
    check_owned_alone(model, [sites[name] for name in changed])
    if checked.ragged:
        check_dispatches(model)
    if verify and not proven:
        refuse_inexact([sites[name] for name in changed])
    if not proven:
        cuts = [(sites[name], heads) for name, heads in changed.items()]
        rehearse(model, cuts, cut_site, run, verify, otherwise)
        for site, heads in cuts:  # what was not rehearsed may not fail halfway either
            cut_site(on_stand_ins(site, without_memory), heads)
    return checked


def without_memory(tensor: Tensor) -> Tensor:
    found = tensor.detach().to("meta")
    return nn.Parameter(found, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else found


def refuse_inexact(sites: Sequence[AttentionSite]) -> None:
    for site in sites:
        reason = getattr(adapter_of(site), "inexact", lambda site: None)(site)
        if reason is not None:
            raise UnsupportedModel(f"{site.name} ({type(site.module).__name__}) cannot lose heads exactly: {reason}")


def carry_out(model: nn.Module, checked: CheckedCut) -> None:
    if checked.ragged:
        whole: Foreign = model
        whole.set_attn_implementation(NAME)
    for name, heads in checked.kept.items():
        cut_site(checked.sites[name], heads)
    for name, site in checked.sites.items():
        if name not in checked.kept:
            getattr(adapter_of(site), "beside_cut", lambda site: None)(site)
    record_cut(model, checked.sites, checked.kept)
    if isinstance(model, PreTrainedModel):
        save_with_code(model)


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
        if not projection.whole or not heads:
            by_module.setdefault(id(projection.module), []).append((projection, projection.features_of(heads)))
    slices: list[Slice] = []
    for parts in by_module.values():
        # Fused projections keep their layout: the features that stay, in their old order.
        slices += slices_of(parts[0][0], torch.cat([features for _, features in parts]).sort().values)
    for extra in site.extras:
        features = extra.features(kept_kv if extra.per_kv_head else kept)
        slices.append(Slice(extra.module, extra.attribute, extra.dim, features))
    keep_slices(slices)
    for parts in by_module.values():
        module: Foreign = parts[0][0].module
        set_sizes(module, *module.weight.shape)
        if not module.weight.numel():
            empty_projection(module)
    for extra in site.extras:
        if isinstance(extra.module, nn.Linear) and extra.attribute == "weight":
            set_sizes(extra.module, *extra.module.weight.shape)
    for part in site.head_modules:
        keep_modules(part, kept_kv if part.per_kv_head else kept)
    dispatcher: Foreign = site.dispatcher
    dispatcher.head_map = head_map
    adapter.after_cut(site, head_map, kept)


@dataclass(frozen=True)
class Slice:
    """`features` (int64, on the CPU) of a module's tensor along `dim` are to take its place."""

    module: Foreign
    attribute: str
    dim: int
    features: Tensor

    @property
    def tensor(self) -> Tensor:
        found: Tensor = getattr(self.module, self.attribute)
        return found


def slices_of(projection: ProjectionHeads, features: Tensor) -> list[Slice]:
    """The projection's weight and, where it lies along the heads, its bias."""
    weight = Slice(projection.module, "weight", projection.weight_dim, features)
    return [weight, Slice(projection.module, "bias", 0, features)] if projection.bias_per_head else [weight]


def keep_slices(slices: Sequence[Slice]) -> None:
    """On a GPU in one launch; else one tensor after the other, so that no more than one is there twice. A parameter stays one; a
    buffer or plain tensor too."""
    copies = gathered_at_once([(one.tensor.detach(), one.dim, one.features) for one in slices])
    for number, one in enumerate(slices):
        old = one.tensor
        data = copies[number] if copies else gathered(old.detach(), one.dim, one.features)
        new = nn.Parameter(data, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else data
        setattr(one.module, one.attribute, new)


def keep_modules(part: HeadModules, heads: Sequence[int]) -> None:
    modules = getattr(part.module, part.attribute)
    left = nn.ModuleList(modules[head] for head in heads)
    left.training = modules.training
    setattr(part.module, part.attribute, left)


def set_sizes(module: Foreign, rows: int, columns: int) -> None:
    if is_conv1d(module):  # weight [in, out]
        module.nx, module.nf = rows, columns
    else:
        module.out_features, module.in_features = rows, columns


def check_owned_alone(model: nn.Module, sites: Sequence[AttentionSite]) -> None:
    """UnsupportedModel where a weight to be cut is also used elsewhere, is made anew at each call, or is not there (offloaded)."""
    users: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                users.setdefault(id(parameter), []).append(f"{name}.{attribute}")
    places: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        places.setdefault(id(module), []).append(name)
    for site in sites:
        inside = tuple(f"{name}." if name else "" for name in places[id(site.module)])
        for projection in site.projections:
            weight, module = projection.module.weight, projection.module
            made = [
                name for name in ("weight", "bias") if isinstance(getattr(module, name), Tensor) and name not in module._parameters
            ]
            if made:
                raise UnsupportedModel(f"the {made[0]} of {projection.name} is made of others at each call; {UNDO}.")
            if len(users.get(id(weight), ())) > 1:
                raise UnsupportedModel(f"{' and '.join(users[id(weight)])} are one tied weight; untie them before pruning.")
            elsewhere = next((name for name in places.get(id(module), ()) if not name.startswith(inside)), None)
            if elsewhere is not None:
                raise UnsupportedModel(f"{projection.name} is also {elsewhere}; give each a layer of its own before pruning.")
            if weight.is_meta and hasattr(module, "_hf_hook"):
                raise UnsupportedModel(f"{projection.name} is offloaded; load the model without a device_map that offloads.")


def check_dispatches(model: nn.Module) -> None:
    """UnsupportedModel unless `model` can be switched to an attention function that runs ragged groups."""
    can = getattr(model, "_can_set_attn_implementation", None)
    if can is None or not can():
        raise UnsupportedModel(
            f"{type(model).__name__} cannot run ragged groups: it has no attention interface. "
            'Plan with granularity="kv_group", which keeps groups equal.'
        )
