"""Attention problems that every kernel must solve, each with one option or a pair, and how exact a solution must be.

The yardstick is PyTorch's own attention in the same dtype: against the reference in fp64 our error may be twice as large.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from headprune import ops
from headprune.head_map import HeadMap
from headprune.ops import reference
from headprune.ops.call import AttentionCall, VarlenCall
from headprune.ops.stats import HeadStats

RAGGED = HeadMap((0, 1, 1), 2)
FIELDS = [field.name for field in fields(HeadStats)]


@dataclass(frozen=True)
class Case:
    """`extras` names tensors that `build` makes: bias, head_bias, key_bias, bool_bias, alibi, sinks, key_mask, nothing (a mask
    that hides every key of one sample), query_mask, gate, sample_gate."""

    name: str
    head_map: HeadMap = RAGGED
    q_len: int = 20
    kv_len: int = 37
    dim: int = 16
    value_dim: int = 16
    causal: bool = False
    window: int = 0
    scale: float | None = None
    softcap: float = 0.0
    extras: str = ""
    stats: bool = False
    batch: int = 1


CASES = [
    Case("plain"),
    Case("causal", causal=True),
    Case("causal, square", kv_len=20, causal=True),
    Case("one query", q_len=1, causal=True),
    Case("one head", HeadMap.uniform(1), causal=True),
    Case("group of 17", HeadMap.uniform(17, 1), q_len=3),
    Case("more queries than keys", q_len=37, kv_len=20, window=9),
    Case("head_dim 80", dim=80, value_dim=80, causal=True),
    Case("head_dim 96, value_dim 33", dim=96, value_dim=33),
    Case("head_dim 33, value_dim 112", dim=33, value_dim=112),
    Case("head_dim 7", dim=7, value_dim=5),
    Case("window", window=5),
    Case("narrow window over many blocks", q_len=35, kv_len=35, window=2),
    Case("wide window", q_len=52, kv_len=52, window=28),
    Case("causal, window", q_len=33, kv_len=60, causal=True, window=36),
    Case("softcap", softcap=2.0, scale=1.0),
    Case("negative scale", scale=-0.3),
    Case("bias", extras="bias", stats=True, batch=2),
    Case("bias per head", extras="head_bias", causal=True),
    Case("bias per key", extras="key_bias", causal=True, window=11, batch=2),
    Case("bool bias", extras="bool_bias", stats=True),
    Case("alibi", extras="alibi"),
    Case("alibi, causal", extras="alibi", causal=True, softcap=3.0),
    Case("sinks", extras="sinks", stats=True),
    Case("sinks, nothing to attend to", extras="sinks nothing", stats=True, batch=2),
    Case("key mask", extras="key_mask", batch=2),
    Case("key mask, causal, NaN behind it", extras="key_mask", causal=True, stats=True),
    Case("nothing to attend to", extras="nothing", stats=True, batch=2),
    Case("gate", extras="gate", stats=True),
    Case("gate per sample", extras="sample_gate", causal=True, stats=True, batch=2),
    Case("statistics", stats=True),
    Case("statistics, causal, square", kv_len=20, causal=True, stats=True),
    Case("statistics, window, two tiles of head_dim", dim=40, value_dim=48, causal=True, window=20, stats=True),
    Case("statistics of some queries", extras="query_mask key_mask", stats=True, batch=2),
    Case("everything", HeadMap((0, 0, 1), 2), causal=True, window=30, softcap=3.0, scale=0.4,
         extras="bias alibi sinks key_mask query_mask sample_gate", stats=True, batch=2),
    Case("key/value heads that no query head reads", HeadMap((1, 1, 3), 5), causal=True, stats=True),
    Case("far softcap", softcap=1e6, scale=1.0),
]  # fmt: skip


@dataclass(frozen=True)
class PackedCase:
    name: str
    lengths_q: tuple[int, ...]
    lengths_k: tuple[int, ...]
    causal: bool = False
    window: int = 0
    extras: str = ""
    stats: bool = False
    head_map: HeadMap = RAGGED
    value_dim: int = 16


PACKED_CASES = [
    PackedCase("packed", (3, 0, 20, 1), (5, 0, 37, 9)),
    PackedCase("packed, causal, shorter keys", (3, 20, 18), (0, 37, 4), causal=True, stats=True),
    PackedCase("packed, everything", (17, 0, 20), (17, 3, 37), True, 11, "alibi sinks sample_gate", True),
]


def stretched(case: Case | PackedCase, factor: int) -> Case | PackedCase:
    """The same case with longer sequences, so that they span several of a GPU's tiles."""
    if isinstance(case, Case):
        return replace(case, q_len=case.q_len * factor, kv_len=case.kv_len * factor, window=case.window * factor)
    lengths = {name: tuple(length * factor for length in getattr(case, name)) for name in ("lengths_q", "lengths_k")}
    return replace(case, window=case.window * factor, **lengths)


def extra_tensors(extras: str, heads: int, batch: int, q_len: int, kv_len: int) -> dict[str, Tensor]:
    made: dict[str, Tensor] = {}
    for name in extras.split():
        if name.endswith("bias"):
            rows = {
                "bias": (batch, heads, q_len),
                "head_bias": (heads, q_len),
                "key_bias": (batch, 1, 1),
                "bool_bias": (q_len,),
                "lowest_bias": (q_len,),
            }
            bias = torch.randn(*rows[name], kv_len)
            made["bias"] = bias > -0.5 if name == "bool_bias" else bias.masked_fill(bias > 1.5, float("-inf"))
        elif name == "alibi":
            made["alibi_slopes"] = 0.3 * torch.rand(heads)
        elif name == "sinks":
            made["sinks"] = torch.randn(heads)
        elif name in ("key_mask", "nothing"):
            made["key_mask"] = torch.rand(batch, kv_len) > 0.4
            made["key_mask"][0, :2] = name == "nothing"
            made["key_mask"][0] &= name != "nothing"
        elif name == "query_mask":
            made["query_mask"] = torch.rand(batch, q_len) > 0.3
        else:
            made["gate"] = torch.rand(heads) if name == "gate" else torch.rand(batch, heads)
            made["gate"][..., -1] = 0.0
    return made


def build(case: Case, device: str, dtype: torch.dtype) -> AttentionCall:
    """The call, with strides as projections leave them. What a key mask hides holds NaN."""
    torch.manual_seed(len(case.name))
    batch, heads, kv_heads = case.batch, case.head_map.query_heads, case.head_map.kv_heads
    query = torch.randn(batch, case.q_len, heads, case.dim).transpose(1, 2)
    key = torch.randn(batch, case.kv_len, kv_heads, case.dim).transpose(1, 2)
    value = torch.randn(batch, kv_heads, case.kv_len, case.value_dim)
    extras = extra_tensors(case.extras, heads, batch, case.q_len, case.kv_len)
    if "key_mask" in extras:
        hidden = ~extras["key_mask"][:, None, :, None]
        key, value = key.masked_fill(hidden, float("nan")), value.masked_fill(hidden, float("nan"))
    names = ("bias", "alibi_slopes", "sinks", "key_mask", "query_mask", "gate")
    return AttentionCall(
        *(tensor.to(device, dtype) for tensor in (query, key, value)), case.head_map, case.causal, case.window,
        case.dim**-0.5 if case.scale is None else case.scale, case.softcap,
        *(extras[name].to(device) if name in extras else None for name in names), case.stats,
    )  # fmt: skip


def build_packed(case: PackedCase, device: str, dtype: torch.dtype) -> VarlenCall:
    torch.manual_seed(len(case.name))
    heads, kv_heads = case.head_map.query_heads, case.head_map.kv_heads
    extras = extra_tensors(case.extras, heads, len(case.lengths_q), 0, 0)
    # Tokens behind the last sequence belong to nobody.
    tokens = sum(case.lengths_k)
    shapes = ((sum(case.lengths_q) + 2, heads, 16), (tokens, kv_heads, 16), (tokens, kv_heads, case.value_dim))
    starts = (torch.tensor([0, *lengths]).cumsum(0).int().to(device) for lengths in (case.lengths_q, case.lengths_k))
    return VarlenCall(
        *(torch.randn(shape).to(device, dtype) for shape in shapes), *starts, max(case.lengths_q), max(case.lengths_k),
        case.head_map, case.causal, case.window, 0.25, 0.0,
        *(extras[name].to(device) if name in extras else None for name in ("alibi_slopes", "sinks", "gate")), case.stats,
    )  # fmt: skip


def in_double(call: AttentionCall | VarlenCall) -> AttentionCall | VarlenCall:
    return replace(call, **{name: getattr(call, name).double() for name in ("query", "key", "value")})


def by_pytorch(call: AttentionCall) -> Tensor:
    """The output by torch's attention (with a soft cap: by its matrix products and softmax) in the call's dtype."""
    dtype, groups = call.query.dtype, list(call.head_map.kv_of_query)
    key, value = (tensor[:, groups].nan_to_num() for tensor in (call.key, call.value))
    mask = torch.zeros(call.batch, call.query_heads, call.query_len, call.kv_len, device=call.query.device)
    if call.alibi_slopes is not None:
        mask -= call.alibi_slopes[:, None, None] * reference.distances(call)
    if call.bias is not None and call.bias.dtype != torch.bool:
        mask += call.bias
    mask = mask.masked_fill(~reference.visible(call), float("-inf"))
    if call.sinks is not None:
        key, value = F.pad(key, (0, 0, 0, 1)), F.pad(value, (0, 0, 0, 1))
        mask = torch.cat([mask, call.sinks[None, :, None, None].expand(*mask.shape[:3], 1)], dim=3)
    mask = mask.to(dtype)
    if call.softcap:
        scores = call.softcap * torch.tanh(call.query @ key.transpose(2, 3) * (call.scale / call.softcap)) + mask
        output = torch.softmax(scores, dim=3) @ value
    else:
        output = F.scaled_dot_product_attention(call.query, key, value, attn_mask=mask, scale=call.scale)
    output = output.nan_to_num()
    return output if call.gate is None else output * reference.per_sample(call.gate)[..., None, None].to(dtype)


def implementation(operator: str, backend: str) -> Callable:
    return next(found.run for found in ops.operators()[operator] if found.backend == backend)


def check(case: Case, device: str, dtype: torch.dtype, backend: str) -> None:
    """The backend's output, lse and statistics of the case; AssertionError says what is off."""
    call = build(case, device, dtype)
    run = implementation("attention", backend)
    output, lse, stats = run(call)
    exact, exact_lse, exact_stats = reference.attention_forward(in_double(call))
    compare_output(output, exact, by_pytorch(call), dtype)
    if call.gate is not None:
        zero = (call.gate == 0).expand(call.batch, -1)
        assert (output[zero] == 0).all()
        exact_lse = exact_lse.masked_fill(zero[..., None], float("-inf"))
    compare_rest(lse, exact_lse, stats, exact_stats, dtype)


def check_packed(case: PackedCase, device: str, dtype: torch.dtype, backend: str) -> None:
    call = build_packed(case, device, dtype)
    run = implementation("attention_varlen", backend)
    output, lse, stats = run(call)
    exact, exact_lse, exact_stats = reference.attention_varlen_forward(in_double(call))
    theirs = torch.zeros_like(output)
    for index, ((q0, q1), (k0, k1)) in enumerate(zip(pairwise(call.cu_seqlens_q.tolist()), pairwise(call.cu_seqlens_k.tolist()))):
        alone = [tensor.transpose(0, 1)[None] for tensor in (call.query[q0:q1], call.key[k0:k1], call.value[k0:k1])]
        gate = None if call.gate is None else call.gate[index : index + 1]
        one = AttentionCall(
            *alone, call.head_map, call.causal, call.window, call.scale, 0.0, None, call.alibi_slopes, call.sinks, None, None, gate,
            False,
        )  # fmt: skip
        if q1 > q0:
            theirs[q0:q1] = by_pytorch(one)[0].transpose(0, 1)
        if gate is not None:
            exact_lse[gate[0] == 0, q0:q1] = float("-inf")
    compare_output(output, exact, theirs, dtype)
    compare_rest(lse, exact_lse, stats, exact_stats, dtype)


def compare_output(output: Tensor, exact: Tensor, theirs: Tensor, dtype: torch.dtype) -> None:
    assert output.dtype == dtype
    assert output.shape == exact.shape
    ours, limit = (output - exact).abs().max(), 2 * (theirs - exact).abs().max() + torch.finfo(dtype).eps
    assert ours <= limit, f"output is off by {ours:.2e}, allowed {limit:.2e}"


def compare_rest(lse: Tensor, exact_lse: Tensor, stats: Tensor, exact_stats: Tensor, dtype: torch.dtype) -> None:
    assert torch.allclose(lse.double(), exact_lse.double(), rtol=1e-5, atol=1e-4), (
        f"lse is off by {(lse - exact_lse).abs().nan_to_num().max():.2e}"
    )
    assert stats.shape == exact_stats.shape
    for name, ours, exact in zip(FIELDS, stats, exact_stats):
        # The norm is that of an output whose probabilities were rounded to dtype.
        tolerance = max(1e-4, torch.finfo(dtype).eps) if name == "output_norm" else 1e-4
        assert torch.allclose(ours, exact, rtol=tolerance, atol=tolerance), f"{name}: {ours.tolist()} is not {exact.tolist()}"


def failures(cases: list[Case | PackedCase], device: str, dtype: torch.dtype, backend: str) -> list[str]:
    """What is wrong in which case."""
    found = []
    for case in cases:
        try:
            (check if isinstance(case, Case) else check_packed)(case, device, dtype, backend)
        except AssertionError as error:
            found.append(f"{case.name}, {dtype}: {str(error).splitlines()[0]}")
    return found
