"""How many tokens each attention of a model runs, and how often, seen in one pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headprune.models.site import AttentionSite
from headprune.models.uncompiled import uncompiled


@dataclass
class TokenCount:
    """Of one attention, over all its calls and all samples. queries: tokens that it gives. keys: tokens that its keys and values
    are made of. pairs: of a query and a key in the same sequence or window."""

    queries: int = 0
    keys: int = 0
    pairs: int = 0


@torch.no_grad()
def count_tokens_of_sites(model: nn.Module, sites: Sequence[AttentionSite], run: Callable[[], Any]) -> dict[str, TokenCount]:
    """Site -> what it runs in `run`, a pass of `model`; zeros where it is not reached."""
    counts = {site.name: TokenCount() for site in sites}
    with ExitStack() as stack:
        stack.enter_context(uncompiled(model))
        for site in sites:
            stack.enter_context(counting(site, counts[site.name]))
        run()
    return counts


@contextmanager
def counting(site: AttentionSite, count: TokenCount) -> Iterator[None]:
    """Inside the block `count` grows with every call of `site`."""
    streams = len(site.outputs)
    read: list[torch.Size] = []  # by this call; DeBERTa projects positions behind the states
    given: list[torch.Size] = []

    def keys_of(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        read.append(places_of(args, kwargs))

    def queries_of(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given.append(places_of(args, kwargs))
        if len(given) < streams:
            return
        queries, keys = sum(places.numel() for places in given), read[:streams] or given  # of an earlier attention
        count.queries += queries
        count.keys += sum(places.numel() for places in keys)
        count.pairs += queries * sum(math.prod(places[1:]) if len(places) > 1 else places.numel() for places in keys)
        read.clear()
        given.clear()

    with ExitStack() as stack:
        if site.own_keys:
            for part in [part for part in site.projections if part.role == "key"][:streams]:
                stack.callback(part.module.register_forward_pre_hook(keys_of, with_kwargs=True).remove)
        for output in site.outputs:
            stack.callback(output.module.register_forward_pre_hook(queries_of, with_kwargs=True).remove)
        yield


def places_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Size:
    """The shape of what a layer is called with, without the features."""
    states: Tensor = args[0] if args else next(iter(kwargs.values()))
    return states.shape[:-1]
