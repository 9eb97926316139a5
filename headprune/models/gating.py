"""Gates on heads without touching a weight: the yardstick of surgery (cutting must equal gating)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from headprune.errors import InvalidInput, InvalidPlan, unknown_name
from headprune.models.adapters import attention_sites
from headprune.models.feed_forward import FeedForward
from headprune.models.site import AttentionSite
from headprune.models.uncompiled import uncompiled
from headprune.nn.given import plain_module
from headprune.nn.replace import own_attention


@contextmanager
def gated(model: nn.Module, keep: Mapping[str, Sequence[int]]) -> Iterator[nn.Module]:
    """The same model with the gates of all other heads at 0; nothing is cut, and it is as before afterwards.

    keep: site name -> the query heads that stay open; sites left out keep all. Inside the block every
    torch.nn.MultiheadAttention is a VariableHeadAttention with a copy of its weights (to train with gates, call
    `hp.nn.replace_multihead_attention` first, or what these learn is lost), and a compiled model runs uncompiled.
    Raises InvalidInput for an unknown site or head.
    """
    inside = plain_module(model)
    with own_attention(inside), uncompiled(model), ExitStack() as stack:
        sites = sites_by_name(inside)
        for name, heads in checked_keep(sites, keep).items():
            site = sites[name]
            open_heads = torch.zeros(site.head_map.query_heads)
            open_heads[list(heads)] = 1.0
            stack.enter_context(output_input_hook(site, gate_columns(site.by_column(open_heads))))
        yield model


def gate_columns(columns: Tensor) -> Callable[[Tensor], Tensor]:
    def gate(inputs: Tensor) -> Tensor:
        return inputs * columns.to(inputs)

    return gate


@contextmanager
def output_input_hook(site: AttentionSite | FeedForward, change: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    """Inside the block `change` sees the input [batch, tokens, features] of each output projection, and may return another."""

    def hook(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        changed = change(args[0])
        return None if changed is None else (changed, *args[1:])

    with ExitStack() as stack:
        for output in site.outputs:
            stack.callback(output.module.register_forward_pre_hook(hook).remove)
        yield


@contextmanager
def output_input_hooks(sites: Iterable[AttentionSite], change_of: Callable[[AttentionSite], Callable[..., Any]]) -> Iterator[None]:
    """`output_input_hook` at every site, with the `change` that `change_of(site)` gives."""
    with ExitStack() as stack:
        for site in sites:
            stack.enter_context(output_input_hook(site, change_of(site)))
        yield


def sites_by_name(model: nn.Module) -> dict[str, AttentionSite]:
    return {site.name: site for site in attention_sites(model)}


def checked_keep(sites: Mapping[str, AttentionSite], keep: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
    """`keep` with sorted heads, each of which exists; InvalidPlan or InvalidInput otherwise."""
    if not isinstance(keep, Mapping):
        raise InvalidInput(f"keep is {keep!r:.100}; expected a dict or plan: site name -> the query heads to keep.")
    found = {}
    for name, heads in keep.items():
        if name not in sites:
            raise InvalidPlan(str(unknown_name("attention site", name, sites)))
        try:
            found[name] = sites[name].head_map.checked(heads)
        except InvalidInput as error:
            raise InvalidInput(f"{name}: {error}") from None
    return found
