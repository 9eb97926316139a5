"""Watching a module's attention: the call that it makes, and the statistics of its heads, while the model runs as ever."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from headprune.errors import InvalidInput
from headprune.head_map import HeadMap
from headprune.ops.attention import attend, attention
from headprune.ops.call import BATCHED, AttentionCall, check_alike, check_call, default_scale
from headprune.ops.gate import gate_of
from headprune.ops.stats import HeadStats

WATCHERS = "attention_watchers"  # the attribute of a watched module


@dataclass(frozen=True)
class Watcher:
    """`seen(call, statistics)` after each attention of the watched module; statistics are None unless `stats` is set.

    query_mask: `query_mask(query)` gives bool [batch, query_len], the rows that count in the statistics, or None for all.
    """

    seen: Callable[[AttentionCall, HeadStats | None], None]
    stats: bool = False
    query_mask: Callable[[Tensor], Tensor | None] | None = None


@contextmanager
def watched(module: nn.Module, watcher: Watcher) -> Iterator[None]:
    """Inside the block `watcher` sees the attentions that `module` computes through `attention_of`. At most one watcher of a
    module asks for statistics."""
    before = getattr(module, WATCHERS, ())
    setattr(module, WATCHERS, (*before, watcher))
    try:
        yield
    finally:
        setattr(module, WATCHERS, before)
        if not before:
            delattr(module, WATCHERS)


def attention_of(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    head_map: HeadMap,
    *,
    causal: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    key_mask: Tensor | None = None,
    gate: Tensor | None = None,
) -> Tensor:
    """`headprune.ops.attention` on behalf of `module`: with the gate that is on the module, and who watches it sees it."""
    gate = gate_of(module, gate)
    watchers = getattr(module, WATCHERS, ())
    if not watchers:
        return attention(
            query, key, value, head_map, causal=causal, scale=scale, softcap=softcap, bias=bias, sinks=sinks, key_mask=key_mask,
            gate=gate,
        )  # fmt: skip
    counting = next((watcher for watcher in watchers if watcher.stats), None)
    query_mask = counting.query_mask(query) if counting and counting.query_mask else None
    if counting and key_mask is None and bias is not None:
        key_mask = keys_seen(bias, query.shape[0], key.shape[2])
    check_alike({"query": query, "key": key, "value": value}, BATCHED)
    scale = default_scale(query) if scale is None else scale
    call = check_call(
        AttentionCall(
            query, key, value, head_map, causal, 0, scale, softcap or 0.0, bias, None, sinks, key_mask, query_mask, gate,
            counting is not None,
        )
    )  # fmt: skip
    output, statistics = attend(call)
    for watcher in watchers:
        watcher.seen(call, statistics if watcher.stats else None)
    return output


def keys_seen(bias: Tensor, batch: int, kv_len: int) -> Tensor:
    """bool [batch, kv_len]: the keys that some query may attend to. As a key mask it hides nothing more, and tells the
    statistics which key of a padded sample is its first."""
    seen = bias if bias.dtype == torch.bool else bias != float("-inf")
    return seen.view((1,) * (4 - seen.dim()) + seen.shape).any(dim=1).any(dim=1).expand(batch, kv_len)


def is_watched(module: nn.Module) -> bool:
    return bool(getattr(module, WATCHERS, ()))


def refuse_watched(module: nn.Module, what: str) -> None:
    """InvalidInput where `module` is watched while it computes its attention in a way that cannot be seen."""
    if is_watched(module):
        raise InvalidInput(f"the attention of {type(module).__name__} cannot be observed with {what}; leave that out.")
