"""Attention over packed sequences: schema, fake, autograd. What computes it is chosen in `backend.py`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypedDict, Unpack, overload

import torch
from torch import Tensor

from headprune.arguments import explained
from headprune.head_map import HeadMap
from headprune.ops.at_once import run_operator
from headprune.ops.attention import check_fixed_slopes, head_map_of, library, whole_gradient
from headprune.ops.backend import choose
from headprune.ops.call import PACKED, VarlenCall, check_alike, check_varlen, default_scale, equal_groups
from headprune.ops.reference import attention_varlen_backward
from headprune.ops.stats import HeadStats

_OPTIONS = (
    "Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_q, SymInt max_k, int[] kv_of_query, bool causal, int window, "
    "float scale, float softcap, Tensor? alibi_slopes, Tensor? sinks, Tensor? gate, bool stats"
)
library.define(f"attention_varlen(Tensor query, Tensor key, Tensor value, {_OPTIONS}) -> (Tensor, Tensor, Tensor)")
library.define(
    f"attention_varlen_backward(Tensor grad_output, Tensor output, Tensor lse, bool[] needs, Tensor query, Tensor key, "
    f"Tensor value, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


class VarlenOptions(TypedDict, total=False):
    """The options of `attention_varlen` that its return type does not depend on."""

    max_seqlen_q: int | None
    max_seqlen_k: int | None
    causal: bool
    window: int | None
    scale: float | None
    softcap: float | None
    alibi_slopes: Tensor | None
    sinks: Tensor | None
    gate: Tensor | None


@overload
def attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    head_map: HeadMap | None = None,
    *,
    stats: Literal[False] = False,
    **options: Unpack[VarlenOptions],
) -> Tensor: ...


@overload
def attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    head_map: HeadMap | None = None,
    *,
    stats: Literal[True],
    **options: Unpack[VarlenOptions],
) -> tuple[Tensor, HeadStats]: ...


@overload
def attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    head_map: HeadMap | None = None,
    *,
    stats: bool,
    **options: Unpack[VarlenOptions],
) -> Tensor | tuple[Tensor, HeadStats]: ...


@explained
def attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    head_map: HeadMap | None = None,
    *,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    gate: Tensor | None = None,
    stats: bool = False,
) -> Tensor | tuple[Tensor, HeadStats]:
    """`attention` on packed sequences, each of which sees itself alone.

    Args:
        query: [tokens, query_heads, head_dim], all sequences one after the other.
        key: [key_tokens, kv_heads, head_dim].
        value: [key_tokens, kv_heads, value_dim].
        cu_seqlens_q, cu_seqlens_k: int32 [sequences + 1], from 0 up: where each sequence starts and the last one ends; tokens
            behind that give 0.
        max_seqlen_q, max_seqlen_k: the longest lengths; None reads them from the device (which waits for it).
        gate: [query_heads] or [sequences, query_heads].

    The rest as in `headprune.ops.attention`; causal is bottom-right aligned in each sequence.

    Returns: [tokens, query_heads, value_dim]; with stats also HeadStats, each field [sequences, query_heads].

    Raises InvalidInput for shapes, dtypes or options that do not fit each other, and for slopes that are to get a gradient.
    """
    check_alike({"query": query, "key": key, "value": value}, PACKED)
    head_map = equal_groups(query.shape[1], key.shape[1]) if head_map is None else head_map
    call = check_varlen(
        VarlenCall(
            query,
            key,
            value,
            cu_seqlens_q,
            cu_seqlens_k,
            longest(cu_seqlens_q) if max_seqlen_q is None else max_seqlen_q,
            longest(cu_seqlens_k) if max_seqlen_k is None else max_seqlen_k,
            head_map,
            causal,
            window or 0,
            default_scale(query) if scale is None else scale,
            softcap or 0.0,
            alibi_slopes,
            sinks,
            gate,
            stats,
        )
    )
    output, _, packed = run_operator("attention_varlen", call)
    return (output, HeadStats.from_packed(packed)) if stats else output


def longest(cu_seqlens: Tensor) -> int:
    length: Any = cu_seqlens.diff().max().item() if cu_seqlens.numel() > 1 else 0
    found: int = length  # through int() an export could not follow it
    return found


def as_varlen_call(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> VarlenCall:
    cu_q, cu_k, max_q, max_k, kv_of_query, *options = rest
    return VarlenCall(query, key, value, cu_q, cu_k, max_q, max_k, head_map_of(tuple(kv_of_query), key.shape[1]), *options)


def _run(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    call = as_varlen_call(*args)
    found: tuple[Tensor, Tensor, Tensor] = choose("attention_varlen", call).run(call)
    return found


def _fake(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    query, value, sequences, stats = args[0], args[2], args[3].shape[0] - 1, args[-1]
    tokens, heads, _ = query.shape
    lse = query.new_empty((heads, tokens), dtype=torch.promote_types(query.dtype, torch.float32))
    packed = query.new_empty((6, sequences, heads) if stats else (0,), dtype=torch.float32)
    return query.new_empty((tokens, heads, value.shape[2])), lse, packed


def _run_backward(grad_output: Tensor, output: Tensor, lse: Tensor, needs: Sequence[bool], *args: Any) -> tuple[Tensor, ...]:
    call = as_varlen_call(*args)
    grads = choose("attention_varlen_backward", call).run(call, grad_output, output, lse, tuple(needs))
    inputs = (call.query, call.key, call.value, call.sinks, call.gate)
    return tuple(whole_gradient(call.query, grad, tensor) for grad, tensor in zip(grads, inputs))


def _fake_backward(grad_output: Tensor, output: Tensor, lse: Tensor, needs: Sequence[bool], *args: Any) -> tuple[Tensor, ...]:
    tensors = (args[0], args[1], args[2], args[13], args[14])
    return tuple(torch.empty_like(tensor) if need else args[0].new_empty(0) for tensor, need in zip(tensors, needs))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    check_fixed_slopes(ctx.needs_input_grad[12])
    ctx.mark_non_differentiable(output[1], output[2])
    query, key, value, cu_q, cu_k, *options, alibi_slopes, sinks, gate, _ = inputs
    ctx.options = tuple(options)
    ctx.save_for_backward(query, key, value, cu_q, cu_k, alibi_slopes, sinks, gate, output[0], output[1])


def _backward(ctx: Any, grad_output: Tensor, _lse: Tensor, _stats: Tensor) -> tuple[Any, ...]:
    query, key, value, cu_q, cu_k, alibi_slopes, sinks, gate, output, lse = ctx.saved_tensors
    needs = tuple(ctx.needs_input_grad[index] for index in (0, 1, 2, 13, 14))
    args = (query, key, value, cu_q, cu_k, *ctx.options, alibi_slopes, sinks, gate, False)
    if torch.is_grad_enabled():  # to be differentiated in its turn, which kernels' gradients cannot be
        grads = attention_varlen_backward(as_varlen_call(*args), grad_output, needs, again=True)
    else:
        grads = torch.ops.headprune.attention_varlen_backward(grad_output, output, lse, list(needs), *args)
    dq, dk, dv, dsinks, dgate = (grad if need else None for grad, need in zip(grads, needs))
    return dq, dk, dv, None, None, None, None, None, None, None, None, None, None, dsinks, dgate, None


for _name, _function, _shape in (("attention_varlen", _run, _fake), ("attention_varlen_backward", _run_backward, _fake_backward)):
    for _device in ("CPU", "CUDA"):
        library.impl(_name, _function, _device)
    torch.library.register_fake(f"headprune::{_name}", _shape, lib=library)
torch.library.register_autograd("headprune::attention_varlen", _backward, setup_context=_setup_context, lib=library)
