"""Decode attentions that every kernel must compute, and how exact it must be."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from headprune.head_map import HeadMap
from headprune.ops import reference
from headprune.ops.call import DecodeCall, check_decode


def grouped(*sizes: int) -> HeadMap:
    return HeadMap(tuple(kv for kv, size in enumerate(sizes) for _ in range(size)), len(sizes))


RAGGED = grouped(3, 1, 3)


@dataclass(frozen=True)
class Case:
    head_map: HeadMap
    lengths: tuple[int, ...]
    new: int = 1
    dim: int = 64
    value_dim: int = 64
    page_size: int = 0
    options: tuple[str, ...] = ()
    window: int = 0
    by_token: bool = False  # cache kept as [batch, capacity, kv_heads, dim]
    splits: int | None = None


CASES = {
    "ragged, lengths 0 and 1": Case(RAGGED, (513, 0, 1, 77), new=2, splits=2),
    "one head": Case(grouped(1), (1000,), splits=3),
    "groups of 17 and 33": Case(grouped(17, 33, 2), (300, 5)),
    "8 new tokens, one key/value head, window": Case(grouped(7), (620, 90), new=8, window=300, splits=2),
    "pages of 16": Case(RAGGED, (301, 33), page_size=16, options=("softcap", "sinks")),
    "pages of 256": Case(RAGGED, (530, 256), page_size=256, options=("alibi", "gate"), splits=2),
    "padding": Case(RAGGED, (300, 280), new=3, options=("key_mask", "alibi")),
    "every option": Case(
        grouped(2, 4), (333, 1, 280), new=4, page_size=24, window=270, splits=2,
        options=("softcap", "sinks", "alibi", "key_mask", "sample_gate"),
    ),
    "wide heads by token": Case(grouped(2, 3), (270, 31), dim=96, value_dim=96, by_token=True, options=("sinks",)),
    # More than the merge takes at once; the shorter samples use fewer of them.
    "many splits": Case(grouped(2, 1), (17000, 2600, 0), splits=70),
    "every head gated off": Case(RAGGED, (300,), options=("no_gate",), splits=2),
}  # fmt: skip
# Value heads of another size: a kernel may refuse them.
UNEQUAL = {"head_dim 80, value_dim 24": Case(RAGGED, (290, 3), dim=80, value_dim=24), "tiny": Case(grouped(2), (9,), 2, 6, 5)}


@dataclass(frozen=True)
class Built:
    call: DecodeCall
    clean: DecodeCall = field(repr=False)  # the same with 0 where `call` has NaN


def build(case: Case, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> Built:
    """A random call whose cache holds NaN wherever it must not be read."""
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *size: torch.randn(*size, generator=generator)  # noqa: E731
    heads, kv_heads, batch = case.head_map.query_heads, case.head_map.kv_heads, len(case.lengths)
    capacity = max(case.lengths) + 7
    pages = -(-capacity // case.page_size) if case.page_size else 0
    capacity = pages * case.page_size or capacity
    lengths = torch.tensor(case.lengths, dtype=torch.int32)
    positions = torch.arange(capacity)
    readable = positions < lengths[:, None]
    key_mask = torch.rand(batch, capacity, generator=generator) < 0.8 if "key_mask" in case.options else None
    if key_mask is not None:
        key_mask[:, :5] = False
        readable = readable & key_mask
    if case.window:
        readable = readable & (positions > (lengths.long() - case.new - case.window)[:, None])
    gate = normal(batch, heads)
    gate[:, ::3] = 0
    gates = {"gate": gate[0], "sample_gate": gate, "no_gate": torch.zeros(heads)}
    base = DecodeCall(
        normal(batch, case.new, heads, case.dim).transpose(1, 2).to(device, dtype), None, None, lengths.to(device), None,
        case.head_map, case.window, case.dim**-0.5, 2.0 if "softcap" in case.options else 0.0,
        torch.rand(heads, generator=generator) * 0.1 if "alibi" in case.options else None,
        normal(heads) if "sinks" in case.options else None, key_mask,
        next((gates[name] for name in case.options if name in gates), None),
    )  # fmt: skip
    base = replace(base, **{name: value.to(device) for name, value in vars(base).items() if isinstance(value, Tensor)})
    order = torch.randperm(batch * pages, generator=generator).reshape(batch, pages)
    caches = [normal(batch, kv_heads, capacity, dim) for dim in (case.dim, case.value_dim)]

    def filled(value: float) -> DecodeCall:
        held = [cache.masked_fill(~readable[:, None, :, None], value) for cache in caches]
        table = None
        if pages:
            held = [paged(cache, order, case.page_size) for cache in held]
            table = order.int().masked_fill(torch.arange(pages) * case.page_size >= lengths[:, None], 2**30).to(device)
        elif case.by_token:
            held = [cache.transpose(1, 2).contiguous().transpose(1, 2) for cache in held]
        key, value = (cache.to(device, dtype) for cache in held)
        return check_decode(replace(base, key_cache=key, value_cache=value, page_table=table))

    return Built(filled(float("nan")), filled(0.0))


def paged(cache: Tensor, order: Tensor, size: int) -> Tensor:
    batch, heads, capacity, dim = cache.shape
    pages = cache.new_empty(order.numel(), heads, size, dim)
    pages[order.flatten()] = cache.reshape(batch, heads, capacity // size, size, dim).transpose(1, 2).flatten(0, 1)
    return pages


def in_fp64(call: DecodeCall) -> DecodeCall:
    return replace(call, query=call.query.double(), key_cache=call.key_cache.double(), value_cache=call.value_cache.double())


def eager(call: DecodeCall) -> Tensor:
    """Decode as models without kernels compute it: products in the input's dtype, softmax in fp32, all heads expanded."""
    key, value = call.key_cache, call.value_cache
    if call.page_table is not None:
        key, value = (reference.gathered_pages(cache, call.page_table) for cache in (key, value))
    groups = torch.tensor(call.head_map.kv_of_query, device=key.device)
    key, value = key[:, groups], value[:, groups]
    ahead = torch.arange(key.shape[2], device=key.device) - (
        torch.arange(call.new, device=key.device) - call.new + call.lengths[:, None]
    )[..., None]  # fmt: skip
    allowed = (ahead <= 0) & ((ahead > -call.window) | (call.window == 0))
    if call.key_mask is not None:
        allowed = allowed & call.key_mask[:, None]
    scores = (call.query @ key.transpose(2, 3) * call.scale).float()
    if call.softcap:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    if call.alibi_slopes is not None:
        scores = scores - call.alibi_slopes[:, None, None] * ahead.abs()[:, None]
    scores = scores.masked_fill(~allowed[:, None], float("-inf"))
    sinks = scores.new_full((scores.shape[1],), float("-inf")) if call.sinks is None else call.sinks.float()
    scores = torch.cat([scores, sinks[None, :, None, None].expand(*scores.shape[:3], 1)], dim=3)
    output = scores.softmax(dim=3).nan_to_num(0.0)[..., :-1].to(value.dtype) @ value
    return output if call.gate is None else output * reference.per_sample(call.gate).to(output.dtype)[..., None, None]


def assert_exact(found: Tensor, call: DecodeCall, clean: DecodeCall, name: str) -> None:
    """`found` errs against fp64 at most twice as much as eager PyTorch in the same dtype, and two units in the last place of the
    result and, in fp32, of the values that are added up: so much a GPU's exponential errs alone."""
    exact = reference.attention_decode(in_fp64(call))
    assert found.shape == exact.shape, name
    assert found.dtype == call.query.dtype, name
    error = (found.double() - exact).abs().max().item()
    theirs = (eager(clean).double() - exact).abs().max().item()
    without_signs = reference.attention_decode(replace(in_fp64(call), value_cache=call.value_cache.double().abs().nan_to_num()))
    unit = 2 * torch.finfo(found.dtype).eps * exact.abs().max().item() + 2 * torch.finfo().eps * without_signs.abs().max().item()
    assert error <= 2 * theirs + unit, f"{name}: {error} against {theirs} of PyTorch"
