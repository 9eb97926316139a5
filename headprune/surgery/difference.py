"""What one model has lost against another: heads by number, parameters, FLOPs, cache."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rich.table import Table
from torch import nn

from headprune.arguments import check_arguments
from headprune.errors import InvalidInput
from headprune.head_map import HeadMap
from headprune.models import AttentionSite, attention_sites
from headprune.models.selection import runs
from headprune.nn.given import plain_module
from headprune.nn.replace import own_attention
from headprune.surgery.checkpoint import skeleton
from headprune.surgery.companions import origin_of
from headprune.surgery.manifest import manifest_of
from headprune.surgery.record import record_of
from headprune.surgery.savings import Savings


@dataclass(frozen=True)
class Difference:
    """removed: attention -> the query heads that are gone, numbered as in the unpruned original; None where the models'
    records do not tell which (the counts still do), as for an export. Attentions that lost nothing are left out. savings: counts of
    both."""

    removed: dict[str, tuple[int, ...] | None]
    savings: Savings

    def to_json(self) -> dict[str, Any]:
        attentions = {
            name: {"before": counts(before), "after": counts(after), "removed": self.removed.get(name, ())}
            for name, (before, after) in self.savings.head_maps.items()
        }
        return {**self.savings.to_json(), "attentions": attentions}

    def __str__(self) -> str:
        maps = self.savings.head_maps
        lines = [f"  {name}: {maps[name][0]} -> {maps[name][1]}; gone: {said(heads)}" for name, heads in self.removed.items()]
        return "\n".join([*self.savings.totals(), *(lines or ["  the same heads in every attention"])])

    def __rich__(self) -> Table:
        table = self.savings.table("what is gone", "heads that are gone")
        for name, heads in self.removed.items():
            table.add_row(*self.savings.site_row(name), said(heads))
        return table


def diff(before: nn.Module | str | os.PathLike[str], after: nn.Module | str | os.PathLike[str]) -> Difference:
    """What `after` has lost against `before`; each is a model or the folder of one, of which no weights are read.

    Raises InvalidInput where the two are not made from one model: of another type, other attentions or sizes of them, or heads
    that only `after` has; CorruptCheckpoint where a folder's head sections are not what was saved.
    """
    check_arguments(diff, locals())
    models = [plain_module(found) if isinstance(found, nn.Module) else skeleton(found) for found in (before, after)]
    with own_attention(models[0]), own_attention(models[1]):
        whole, small = ({site.name: site for site in attention_sites(model)} for model in models)
        names = paired(models, whole, small)
        refuse_other_model(models, {name: (whole[name], small[other]) for name, other in names.items()})
        removed, renumbered = {}, any(was_exported(model) for model in models)
        for name, other in names.items():
            heads = removed_heads(name, whole[name], small[other], entry(models[0], name), entry(models[1], other), renumbered)
            if heads != ():
                removed[name] = heads
        first, second = models
        savings = Savings.between(first, second, {name: (whole[name], small[other]) for name, other in names.items()})
    return Difference(removed, savings)


def paired(models: list[nn.Module], whole: Mapping[str, Any], small: Mapping[str, Any]) -> dict[str, str]:
    """Names of the same attention in both; a base model pairs with the same model under a head."""
    for change in (lambda name: name, *(prefixed(model) for model in models), *(unprefixed(model) for model in models)):
        names = {name: change(name) for name in whole}
        if set(names.values()) == set(small):
            return names
    only = sorted(set(whole) ^ set(small))
    raise InvalidInput(f"the models do not have the same attentions: only one of them has {', '.join(only[:3])}.")


def refuse_other_model(models: list[nn.Module], sites: Mapping[str, tuple[AttentionSite, AttentionSite]]) -> None:
    """InvalidInput where attentions of the same names are of another family or size."""
    first, second = (getattr(getattr(model, "config", None), "model_type", None) for model in models)
    if first != second:
        raise InvalidInput(f"the models are not made from one: the first is of type {first}, the second {second}.")
    for name, pair in sites.items():
        one, other = (f"head_dim {site.head_dim}, hidden size {site.hidden_size}" for site in pair)
        if one != other:
            raise InvalidInput(f"the models are not made from one: at {name} the first has {one}, the second {other}.")


def prefixed(model: nn.Module) -> Callable[[str], str]:
    return lambda name: f"{getattr(model, 'base_model_prefix', '')}.{name}"


def unprefixed(model: nn.Module) -> Callable[[str], str]:
    return lambda name: name.removeprefix(f"{getattr(model, 'base_model_prefix', '')}.")


def entry(model: nn.Module, name: str) -> Mapping[str, Any] | None:
    """What earlier cuts of `model` recorded of this attention; None where its heads are no longer the original's."""
    record = record_of(model)
    return None if record.get("regularised") else record.get("sites", {}).get(name, {})


def was_exported(model: nn.Module) -> bool:
    """Whether it comes from an export of headprune's, for which heads are numbered anew and filled up with dead ones."""
    origin = origin_of(model)
    return origin is not None and "exported" in manifest_of(origin)


def removed_heads(
    name: str,
    whole: AttentionSite,
    small: AttentionSite,
    first: Mapping[str, Any] | None,
    second: Mapping[str, Any] | None,
    renumbered: bool,
) -> tuple[int, ...] | None:
    """The heads of `whole` that `small` lacks, by the original's numbers; None where only their number is known.

    renumbered: whether numbers that do not fit may be those of an export.
    """
    if first is None or second is None:
        return () if whole.head_map == small.head_map else None
    originals = [found.get("original", site.head_map.to_json()) for found, site in ((first, whole), (second, small))]
    kept = [found.get("kept", list(range(site.head_map.query_heads))) for found, site in ((first, whole), (second, small))]
    if originals[0] != originals[1] or not set(kept[1]) <= set(kept[0]):
        if renumbered:
            return None
        raise InvalidInput(
            f"the second model was not made from the first: at {name} it has {small.head_map} (heads {kept[1]} of the original), "
            f"the first {whole.head_map} (heads {kept[0]}). Give the dense model first and the pruned one second."
        )
    return tuple(sorted(set(kept[0]) - set(kept[1])))


def counts(head_map: HeadMap) -> dict[str, Any]:
    return {"query_heads": head_map.query_heads, "kv_heads": head_map.kv_heads, "group_sizes": list(head_map.group_sizes)}


def said(heads: tuple[int, ...] | None) -> str:
    if heads is None:
        return "which ones is not recorded"
    return ", ".join(str(first) if count == 1 else f"{first}-{first + count - 1}" for first, count in runs(heads))
