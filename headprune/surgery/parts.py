"""The linear layers that compensation re-solves: their weights, and the heads that are switched off before them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from headprune.models.feed_forward import FeedForward
from headprune.models.gating import gate_columns, output_input_hooks
from headprune.models.site import AttentionSite, Foreign, is_conv1d

Part = AttentionSite | FeedForward  # what is re-solved: `output.module` is the linear layer
Weights = tuple[Tensor, Tensor | None]  # weight [hidden, features] and bias [hidden] of an output projection


def in_order_of_pass(sites: Sequence[AttentionSite], run: Callable[[], Any]) -> tuple[list[AttentionSite], set[str]]:
    """`sites` as one forward pass first reaches them, which need not be as the model declares them; those that it does not reach
    last. And the names of those that it reaches several times (shared layers)."""
    calls: Counter[str] = Counter()  # in the order of first calls

    def noting(site: AttentionSite) -> Callable[[Tensor], None]:
        return lambda _inputs: calls.update([site.name])

    with output_input_hooks(sites, noting):
        run()
    named = {site.name: site for site in sites}
    ordered = [*(named[name] for name in calls), *(site for site in sites if site.name not in calls)]
    return ordered, {name for name, count in calls.items() if count > 1}


def from_first_loss(sites: Sequence[AttentionSite], keep: Mapping[str, Sequence[int]]) -> list[AttentionSite]:
    """Those that `keep` names, from the first that loses heads on: before it nothing changes."""
    named = [site for site in sites if site.name in keep]
    losing = (at for at, site in enumerate(named) if len(keep[site.name]) < site.head_map.query_heads)
    return named[next(losing, len(named)) :]


def parts_of(sites: Iterable[AttentionSite], behind: Mapping[str, FeedForward]) -> list[Part]:
    """Each site, and the feed-forward behind it where there is one."""
    found: list[Part] = []
    for site in sites:
        found += [site, behind[site.name]] if site.name in behind else [site]
    return found


def keep_by_output(sites: Iterable[AttentionSite], keep: Mapping[str, Sequence[int]]) -> dict[str, Sequence[int]]:
    """`keep` for the output projections of `sites`, each of which is re-solved by itself (`AttentionSite.by_output`)."""
    return {part.name: keep[site.name] for site in sites if site.name in keep for part in site.by_output()}


def columns_of(part: Part, keep: Mapping[str, Sequence[int]], weight: Tensor) -> Tensor:
    """The inputs of `part` that stay: those of the heads that are kept, or all."""
    if isinstance(part, AttentionSite) and part.name in keep:
        return part.columns(tuple(keep[part.name]))
    return torch.arange(weight.shape[1])


def owner_of(part: Part, columns: Tensor) -> Tensor:
    """[columns], int64, on the CPU: the head that each of these inputs of `part` is of, the heads among them numbered from 0. What
    is of no head counts as one more."""
    if not isinstance(part, AttentionSite):
        return torch.zeros(len(columns), dtype=torch.long, device="cpu")
    heads: Tensor = part.head_of_column()[columns.cpu()]
    numbered: Tensor = heads.unique(return_inverse=True)[1]
    return numbered


def masked_to(site: AttentionSite, keep: Sequence[int]) -> Callable[[Tensor], Tensor]:
    open_heads = torch.zeros(site.head_map.query_heads)
    open_heads[list(keep)] = 1.0
    return gate_columns(site.by_column(open_heads))


@contextmanager
def weights_in_place(parts: Sequence[Part], weights: Mapping[str, Weights]) -> Iterator[None]:
    before = [weight_and_bias(part) for part in parts]
    try:
        for part in parts:
            set_weight_and_bias(part, weights[part.name])
        yield
    finally:
        for part, values in zip(parts, before):
            set_weight_and_bias(part, values)


def weight_and_bias(part: Part) -> Weights:
    """(weight [hidden, features], bias [hidden] or None) of the linear layer, detached."""
    module: Foreign = part.output.module
    weight: Tensor = module.weight.data
    return (weight.T if is_conv1d(module) else weight), None if module.bias is None else module.bias.data


def set_weight_and_bias(part: Part, values: Weights) -> None:
    module: Foreign = part.output.module
    weight, bias = values
    module.weight.data = weight.T if is_conv1d(module) else weight
    if bias is not None:
        module.bias.data = bias
