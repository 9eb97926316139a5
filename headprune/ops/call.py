"""The arguments of one attention, checked once: what every backend receives."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from headprune.errors import InvalidInput
from headprune.head_map import HeadMap


@dataclass(frozen=True)
class AttentionCall:
    """One forward attention: tensors as in `headprune.ops.attention`, defaults resolved.

    `window` and `softcap` are 0 where they are off. `bias` is floating (added to the scores) or bool (True = attend);
    it broadcasts to [batch, query_heads, query_len, kv_len]. `key_mask` is bool [batch, kv_len], `query_mask` bool
    [batch, query_len] (read by the statistics alone), `gate` floating [query_heads] or [batch, query_heads].
    """

    query: Tensor
    key: Tensor
    value: Tensor
    head_map: HeadMap
    causal: bool
    window: int
    scale: float
    softcap: float
    bias: Tensor | None
    alibi_slopes: Tensor | None
    sinks: Tensor | None
    key_mask: Tensor | None
    query_mask: Tensor | None
    gate: Tensor | None
    stats: bool

    @property
    def batch(self) -> int:
        return self.query.shape[0]

    @property
    def query_heads(self) -> int:
        return self.query.shape[1]

    @property
    def query_len(self) -> int:
        return self.query.shape[2]

    @property
    def kv_len(self) -> int:
        return self.key.shape[2]

    @property
    def value_dim(self) -> int:
        return self.value.shape[3]

    def empty_output(self) -> Tensor:
        """[batch, query_heads, query_len, value_dim], laid out token by token: `.transpose(1, 2)` is contiguous."""
        shape = (self.batch, self.query_len, self.query_heads, self.value_dim)
        return self.query.new_empty(shape).transpose(1, 2)

    def empty_lse(self) -> Tensor:
        return self.query.new_empty((self.batch, self.query_heads, self.query_len), dtype=torch.float32)

    def empty_stats(self) -> Tensor:
        """[6, batch, query_heads] in the order of HeadStats' fields; no elements where none were asked for."""
        shape = (6, self.batch, self.query_heads) if self.stats else (0,)
        return self.query.new_empty(shape, dtype=torch.float32)


def check_call(call: AttentionCall) -> AttentionCall:
    """`call` itself, or InvalidInput that names the argument, what it is and what it should be."""
    query, key, value, head_map = call.query, call.key, call.value, call.head_map
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() != 4:
            raise InvalidInput(f"{name} has shape {list(tensor.shape)}; expected 4 dimensions [batch, heads, length, dim].")
        if tensor.dtype != query.dtype or tensor.device != query.device:
            raise InvalidInput(
                f"{name} is {tensor.dtype} on {tensor.device}, query is {query.dtype} on {query.device}; they must agree."
            )
    batch, query_heads, query_len, head_dim = query.shape
    kv_heads, kv_len, value_dim = key.shape[1], key.shape[2], value.shape[3]
    expect("key", key, (batch, head_map.kv_heads, kv_len, head_dim))
    expect("value", value, (batch, kv_heads, kv_len, value_dim))
    if query_heads != head_map.query_heads:
        raise InvalidInput(f"query has {query_heads} heads, the head map {head_map.query_heads} ({head_map}).")
    if call.causal and query_len > kv_len:
        raise InvalidInput(f"causal attention needs kv_len >= query_len (bottom-right aligned); got {kv_len} < {query_len}.")
    if call.window < 0 or call.softcap < 0 or not math.isfinite(call.scale):
        raise InvalidInput(
            f"window={call.window}, softcap={call.softcap}, scale={call.scale}: expected window >= 0, softcap >= 0, a finite scale."
        )
    if call.bias is not None:
        check_bias(call.bias, (batch, query_heads, query_len, kv_len))
    for name, tensor, shapes in (
        ("alibi_slopes", call.alibi_slopes, [(query_heads,)]),
        ("sinks", call.sinks, [(query_heads,)]),
        ("key_mask", call.key_mask, [(batch, kv_len)]),
        ("query_mask", call.query_mask, [(batch, query_len)]),
        ("gate", call.gate, [(query_heads,), (batch, query_heads)]),
    ):
        if tensor is not None:
            expect(name, tensor, *shapes)
            if name.endswith("mask") != (tensor.dtype == torch.bool):
                raise InvalidInput(f"{name} is {tensor.dtype}; expected {'bool' if name.endswith('mask') else 'a floating type'}.")
    return call


def expect(name: str, tensor: Tensor, *shapes: tuple[int, ...]) -> None:
    if tuple(tensor.shape) not in shapes:
        wanted = " or ".join(str(list(shape)) for shape in shapes)
        raise InvalidInput(f"{name} has shape {list(tensor.shape)}; expected {wanted}.")


def check_bias(bias: Tensor, full: tuple[int, ...]) -> None:
    padded = (1,) * (4 - bias.dim()) + tuple(bias.shape)
    if bias.dim() > 4 or any(have not in (1, want) for have, want in zip(padded, full)):
        raise InvalidInput(f"bias has shape {list(bias.shape)}; expected one that broadcasts to {list(full)}.")
    if bias.dtype != torch.bool and not bias.dtype.is_floating_point:
        raise InvalidInput(f"bias is {bias.dtype}; expected a floating type (added to the scores) or bool (True = attend).")
