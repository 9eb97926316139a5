"""The arguments of one attention, checked once: what every backend receives."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

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
        shape = (self.batch, self.query_heads, self.query_len)
        return self.query.new_empty(shape, dtype=torch.promote_types(self.query.dtype, torch.float32))

    def empty_stats(self) -> Tensor:
        """[6, batch, query_heads] in the order of HeadStats' fields; no elements where none were asked for."""
        shape = (6, self.batch, self.query_heads) if self.stats else (0,)
        return self.query.new_empty(shape, dtype=torch.float32)


@dataclass(frozen=True)
class VarlenCall:
    """Attention over packed sequences of different lengths, as in `headprune.ops.attention_varlen`, defaults resolved.

    query [tokens, query_heads, head_dim], key [key_tokens, kv_heads, head_dim], value [key_tokens, kv_heads, value_dim];
    cu_seqlens_* int32 [sequences + 1] are where each sequence starts; max_q, max_k are the longest lengths; gate is
    [query_heads] or [sequences, query_heads].
    """

    query: Tensor
    key: Tensor
    value: Tensor
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_q: int
    max_k: int
    head_map: HeadMap
    causal: bool
    window: int
    scale: float
    softcap: float
    alibi_slopes: Tensor | None
    sinks: Tensor | None
    gate: Tensor | None
    stats: bool

    @property
    def sequences(self) -> int:
        return self.cu_seqlens_q.shape[0] - 1

    @property
    def query_heads(self) -> int:
        return self.query.shape[1]

    @property
    def value_dim(self) -> int:
        return self.value.shape[2]

    def empty_output(self) -> Tensor:
        return self.query.new_empty((self.query.shape[0], self.query_heads, self.value_dim))

    def empty_lse(self) -> Tensor:
        """[query_heads, tokens]."""
        shape = (self.query_heads, self.query.shape[0])
        return self.query.new_empty(shape, dtype=torch.promote_types(self.query.dtype, torch.float32))

    def empty_stats(self) -> Tensor:
        shape = (6, self.sequences, self.query_heads) if self.stats else (0,)
        return self.query.new_empty(shape, dtype=torch.float32)


@dataclass(frozen=True)
class DecodeCall:
    """A few new tokens against a cache, as in `headprune.ops.attention_decode`, defaults resolved.

    query [batch, query_heads, new, head_dim]; key_cache [batch, kv_heads, capacity, head_dim], or with a page_table (int32
    [batch, pages_per_sample]) [pages, kv_heads, page_size, head_dim]; lengths int32 [batch].
    """

    query: Tensor
    key_cache: Tensor
    value_cache: Tensor
    lengths: Tensor
    page_table: Tensor | None
    head_map: HeadMap
    window: int
    scale: float
    softcap: float
    alibi_slopes: Tensor | None
    sinks: Tensor | None
    key_mask: Tensor | None
    gate: Tensor | None

    @property
    def batch(self) -> int:
        return self.query.shape[0]

    @property
    def query_heads(self) -> int:
        return self.query.shape[1]

    @property
    def new(self) -> int:
        return self.query.shape[2]

    @property
    def value_dim(self) -> int:
        return self.value_cache.shape[3]

    @property
    def capacity(self) -> int:
        """The most keys that one sample can have."""
        size = self.key_cache.shape[2]
        return size if self.page_table is None else size * self.page_table.shape[1]

    def empty_output(self) -> Tensor:
        """[batch, query_heads, new, value_dim], laid out token by token."""
        return self.query.new_empty((self.batch, self.new, self.query_heads, self.value_dim)).transpose(1, 2)


def operands(call: AttentionCall | VarlenCall | DecodeCall) -> tuple[Any, ...]:
    """The fields of `call` in their order, as its operator takes them: of the head map its list."""
    if torch.compiler.is_compiling():  # before PyTorch 2.12 it does not follow vars(), which is faster
        values = {name: getattr(call, name) for name in type(call).__dataclass_fields__}
    else:
        values = dict(vars(call))
    values["head_map"] = list(call.head_map.kv_of_query)
    return tuple(values.values())


def equal_groups(query_heads: int, kv_heads: int) -> HeadMap:
    """HeadMap.uniform, made once for each shape."""
    if torch.compiler.is_compiling():  # which does not look into caches
        return HeadMap.uniform(query_heads, kv_heads)
    return made_once(query_heads, kv_heads)


made_once = lru_cache(maxsize=1024)(HeadMap.uniform)


def check_call(call: AttentionCall) -> AttentionCall:
    """`call` itself, whose query, key and value `check_alike` has passed, or InvalidInput that names the argument, what it is and
    what it should be."""
    query, key, value, head_map = call.query, call.key, call.value, call.head_map
    batch, query_heads, query_len, head_dim = query.shape
    kv_heads, kv_len, value_dim = key.shape[1], key.shape[2], value.shape[3]
    expect("key", key, (batch, head_map.kv_heads, kv_len, head_dim))
    expect("value", value, (batch, kv_heads, kv_len, value_dim))
    check_heads(query_heads, head_map)
    if call.causal and query_len > kv_len:
        raise InvalidInput(f"causal attention needs kv_len >= query_len (bottom-right aligned); got {kv_len} < {query_len}.")
    check_numbers(call)
    if call.bias is not None:
        check_bias(call.bias, (batch, query_heads, query_len, kv_len))
        check_device("bias", call.bias, query)
    check_extras(
        query,
        alibi_slopes=(call.alibi_slopes, [(query_heads,)]),
        sinks=(call.sinks, [(query_heads,)]),
        key_mask=(call.key_mask, [(batch, kv_len)]),
        query_mask=(call.query_mask, [(batch, query_len)]),
        gate=(call.gate, [(query_heads,), (batch, query_heads)]),
    )
    return call


def check_varlen(call: VarlenCall) -> VarlenCall:
    """`call` itself, or InvalidInput; lengths on the device are not read."""
    query, key, value, head_map = call.query, call.key, call.value, call.head_map
    expect("key", key, (key.shape[0], head_map.kv_heads, query.shape[2]))
    expect("value", value, (key.shape[0], head_map.kv_heads, value.shape[2]))
    check_heads(call.query_heads, head_map)
    check_numbers(call)
    for name, starts in (("cu_seqlens_q", call.cu_seqlens_q), ("cu_seqlens_k", call.cu_seqlens_k)):
        check_integers(name, starts, query, "sequences + 1")
        expect(name, starts, (max(call.sequences, 0) + 1,))
    check_extras(
        query,
        alibi_slopes=(call.alibi_slopes, [(call.query_heads,)]),
        sinks=(call.sinks, [(call.query_heads,)]),
        gate=(call.gate, [(call.query_heads,), (call.sequences, call.query_heads)]),
    )
    return call


MOST_NEW_TOKENS = 8


def check_decode(call: DecodeCall) -> DecodeCall:
    """`call` itself, or InvalidInput; lengths and page numbers on the device are not read."""
    query, key, value, head_map = call.query, call.key_cache, call.value_cache, call.head_map
    rows = call.batch if call.page_table is None else key.shape[0]
    expect("key_cache", key, (rows, head_map.kv_heads, key.shape[2], query.shape[3]))
    expect("value_cache", value, (rows, head_map.kv_heads, key.shape[2], value.shape[3]))
    check_heads(call.query_heads, head_map)
    check_numbers(call)
    if not 1 <= call.new <= MOST_NEW_TOKENS:
        raise InvalidInput(f"{call.new} new tokens; decode takes 1 to {MOST_NEW_TOKENS}. Use attention for more.")
    check_integers("lengths", call.lengths, query, "batch")
    expect("lengths", call.lengths, (call.batch,))
    if call.page_table is not None:
        check_integers("page_table", call.page_table, query, "batch", "pages_per_sample")
        expect("page_table", call.page_table, (call.batch, call.page_table.shape[-1]))
    check_extras(
        query,
        alibi_slopes=(call.alibi_slopes, [(call.query_heads,)]),
        sinks=(call.sinks, [(call.query_heads,)]),
        key_mask=(call.key_mask, [(call.batch, call.capacity)]),
        gate=(call.gate, [(call.query_heads,), (call.batch, call.query_heads)]),
    )
    return call


DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
BATCHED, PACKED = ("batch", "heads", "length", "dim"), ("tokens", "heads", "dim")


def check_alike(tensors: dict[str, Tensor], dims: tuple[str, ...]) -> None:
    """Dense tensors of the named dimensions, all on one device and of one dtype that attention is computed in (after autocast,
    where it is on). Comes before anything that reads a shape."""
    first, leader = next(iter(tensors.items()))
    dtype, device = leader.dtype, leader.device
    for name, tensor in tensors.items():
        if tensor.is_nested or tensor.layout is not torch.strided:
            check_dense(name, tensor)
        if tensor.dim() != len(dims):
            raise InvalidInput(f"{name} has shape {list(tensor.shape)}; expected {len(dims)} dimensions [{', '.join(dims)}].")
        alike = tensor.dtype == dtype or dtype_under_autocast(tensor) == dtype_under_autocast(leader)
        if not alike or tensor.device != device:
            raise InvalidInput(
                f"{name} is {tensor.dtype} on {tensor.device}, {first} is {leader.dtype} on {leader.device}; they must agree."
            )
    if dtype not in DTYPES and dtype_under_autocast(leader) not in DTYPES:
        raise InvalidInput(f"{', '.join(tensors)} are {dtype}; expected {', '.join(str(one) for one in DTYPES)}.")


def check_dense(name: str, tensor: Tensor) -> None:
    if tensor.is_nested or tensor.layout != torch.strided:
        kind = "nested" if tensor.is_nested else tensor.layout
        raise InvalidInput(f"{name} is {kind}; expected a dense tensor. attention_varlen takes samples of several lengths.")


def default_scale(query: Tensor) -> float:
    """1 / sqrt(head_dim); without features all scores are 0, whatever it is."""
    return 1 / math.sqrt(query.shape[-1] or 1)


def dtype_under_autocast(tensor: Tensor) -> torch.dtype:
    """The dtype that a floating tensor has inside an operator: autocast changes all but fp64."""
    if tensor.dtype == torch.float64 or not torch.is_autocast_enabled(tensor.device.type):
        return tensor.dtype
    return torch.get_autocast_dtype(tensor.device.type)


def check_heads(query_heads: int, head_map: HeadMap) -> None:
    if query_heads != head_map.query_heads:
        raise InvalidInput(f"query has {query_heads} heads, the head map {head_map.query_heads} ({head_map}).")


def check_numbers(call: AttentionCall | VarlenCall | DecodeCall) -> None:
    # Comparisons and not math.isfinite: under torch.compile with dynamic shapes the scale is a symbol.
    if isinstance(call.window, float) or not 0 <= call.window < 2**63:
        raise InvalidInput(f"window is {call.window}; expected how many positions are seen, a whole number, or None for all.")
    if not 0 <= call.softcap < math.inf:
        raise InvalidInput(f"softcap is {call.softcap}; expected a finite number above 0, or None for no cap.")
    if not -math.inf < call.scale < math.inf:
        raise InvalidInput(f"scale is {call.scale}; expected a finite number, or None for 1 / sqrt(head_dim).")


def check_integers(name: str, tensor: Tensor, query: Tensor, *dims: str) -> None:
    if tensor.dtype != torch.int32:
        raise InvalidInput(f"{name} is {tensor.dtype}; expected torch.int32.")
    if tensor.dim() != len(dims):
        raise InvalidInput(f"{name} has shape {list(tensor.shape)}; expected [{', '.join(dims)}].")
    check_device(name, tensor, query)


def check_device(name: str, tensor: Tensor, query: Tensor) -> None:
    """A kernel that is given an address on another device reads whatever it has there, or ends the process."""
    if tensor.device != query.device:
        raise InvalidInput(f"{name} is on {tensor.device}, the query on {query.device}; they must agree.")


def check_extras(query: Tensor, **extras: tuple[Tensor | None, list[tuple[int, ...]]]) -> None:
    """Each optional tensor has one of its shapes, on the query's device; masks are bool, the others floating."""
    for name, (tensor, shapes) in extras.items():
        if tensor is not None:
            expect(name, tensor, *shapes)
            check_device(name, tensor, query)
            if not (tensor.dtype == torch.bool if name.endswith("mask") else tensor.is_floating_point()):
                raise InvalidInput(f"{name} is {tensor.dtype}; expected {'bool' if name.endswith('mask') else 'a floating type'}.")


def expect(name: str, tensor: Tensor, *shapes: tuple[int, ...]) -> None:
    if not has_shape(tensor, shapes):
        wanted = " or ".join(str(list(shape)) for shape in shapes)
        raise InvalidInput(f"{name} has shape {list(tensor.shape)}; expected {wanted}.")


def has_shape(tensor: Tensor, shapes: Sequence[tuple[int, ...]]) -> bool:
    """Whether it has one of them. Compared one by one, and number by number: under torch.compile with free sizes `in` finds nothing
    without looking, and two symbols of one value make no equal tuples."""
    have = tuple(tensor.shape)
    for shape in shapes:  # noqa: SIM110 - a generator takes longer than all comparisons
        if have == shape or (len(have) == len(shape) and all(a == b for a, b in zip(have, shape))):
            return True
    return False


def check_bias(bias: Tensor, full: tuple[int, ...], name: str = "bias") -> None:
    padded = (1,) * (4 - bias.dim()) + tuple(bias.shape)
    if bias.dim() > 4 or any(have != 1 and have != want for have, want in zip(padded, full)):
        raise InvalidInput(f"{name} has shape {list(bias.shape)}; expected one that broadcasts to {list(full)}.")
    if bias.dtype != torch.bool and not bias.dtype.is_floating_point:
        raise InvalidInput(f"{name} is {bias.dtype}; expected a floating type (added to the scores) or bool (True = attend).")
