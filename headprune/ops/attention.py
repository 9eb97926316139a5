"""The attention operator: schema, fake, autograd. What computes it is chosen in `backend.py`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal, TypedDict, Unpack, overload

import torch
from torch import Tensor

from headprune.arguments import explained
from headprune.errors import InvalidInput
from headprune.head_map import HeadMap
from headprune.ops.at_once import run_operator
from headprune.ops.backend import choose
from headprune.ops.call import BATCHED, AttentionCall, check_alike, check_call, default_scale, equal_groups
from headprune.ops.reference import attention_backward
from headprune.ops.stats import HeadStats

# window and softcap are 0 where they are off; kv_of_query and kv_heads are the head map.
_OPTIONS = (
    "int[] kv_of_query, bool causal, int window, float scale, float softcap, Tensor? bias, Tensor? alibi_slopes, "
    "Tensor? sinks, Tensor? key_mask, Tensor? query_mask, Tensor? gate, bool stats"
)
library = torch.library.Library("headprune", "DEF")
library.define(f"attention(Tensor query, Tensor key, Tensor value, {_OPTIONS}) -> (Tensor, Tensor, Tensor)")
library.define(
    f"attention_backward(Tensor grad_output, Tensor output, Tensor lse, bool[] needs, Tensor query, Tensor key, Tensor value, "
    f"{_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


class AttentionOptions(TypedDict, total=False):
    """The options of `attention` that its return type does not depend on."""

    causal: bool
    window: int | None
    scale: float | None
    softcap: float | None
    bias: Tensor | None
    alibi_slopes: Tensor | None
    sinks: Tensor | None
    key_mask: Tensor | None
    query_mask: Tensor | None
    gate: Tensor | None


@overload
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    head_map: HeadMap | None = None,
    *,
    stats: Literal[False] = False,
    **options: Unpack[AttentionOptions],
) -> Tensor: ...


@overload
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    head_map: HeadMap | None = None,
    *,
    stats: Literal[True],
    **options: Unpack[AttentionOptions],
) -> tuple[Tensor, HeadStats]: ...


@overload
def attention(
    query: Tensor, key: Tensor, value: Tensor, head_map: HeadMap | None = None, *, stats: bool, **options: Unpack[AttentionOptions]
) -> Tensor | tuple[Tensor, HeadStats]: ...


@explained
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    head_map: HeadMap | None = None,
    *,
    causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    key_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    gate: Tensor | None = None,
    stats: bool = False,
) -> Tensor | tuple[Tensor, HeadStats]:
    """Softmax attention with any number of query heads per key/value head.

    Args:
        query: [batch, query_heads, query_len, head_dim]; fp16, bf16, fp32, fp64 (on a GPU through the reference); any strides.
        key: [batch, kv_heads, kv_len, head_dim].
        value: [batch, kv_heads, kv_len, value_dim].
        head_map: which key/value head each query head reads; None for equal groups.
        causal: query i sees keys up to i + kv_len - query_len (bottom-right aligned, as with a cache).
        window: keys nearer than this many positions are seen, the query's own counted (with causal: i - window < j <= i);
            None or 0: all.
        scale: factor on the scores; default 1 / sqrt(head_dim).
        softcap: scores become softcap * tanh(scores / softcap) (Gemma 2); None or 0: as they are.
        bias: added to the scores, or bool (True = attend); broadcasts to [batch, query_heads, query_len, kv_len].
        alibi_slopes: [query_heads]; subtracts slope * distance from the scores (Press et al. 2022); without gradient.
        sinks: [query_heads]; a logit that takes part in the softmax and has no value (gpt-oss).
        key_mask: bool [batch, kv_len], True = may be attended to, any pattern.
        query_mask: bool [batch, query_len], True = counts in the statistics; it does not change the output.
        gate: [query_heads] or [batch, query_heads], factor on each head's output, differentiable; heads whose gate is
            exactly 0 are not computed (their own gate's gradient, where asked, is computed in the backward pass).
        stats: also return HeadStats, without gradient.

    Returns: [batch, query_heads, query_len, value_dim] in the query's dtype, laid out token by token
        (`.transpose(1, 2)` is contiguous); a query with nothing to attend to gives 0. With stats: (output, HeadStats).

    Raises InvalidInput for shapes, dtypes or options that do not fit each other, and for slopes that are to get a gradient.
    """
    check_alike({"query": query, "key": key, "value": value}, BATCHED)
    head_map = equal_groups(query.shape[1], key.shape[1]) if head_map is None else head_map
    call = check_call(
        AttentionCall(
            query,
            key,
            value,
            head_map,
            causal,
            window or 0,
            default_scale(query) if scale is None else scale,
            softcap or 0.0,
            bias,
            alibi_slopes,
            sinks,
            key_mask,
            query_mask,
            gate,
            stats,
        )
    )
    output, statistics = attend(call)
    return output if statistics is None else (output, statistics)


def attend(call: AttentionCall) -> tuple[Tensor, HeadStats | None]:
    """`attention` of a checked call: its output and, where it asks for them, its statistics."""
    output, _, packed = run_operator("attention", call)
    return output, HeadStats.from_packed(packed) if call.stats else None


def as_call(query: Tensor, key: Tensor, value: Tensor, kv_of_query: Sequence[int], *options: Any) -> AttentionCall:
    return AttentionCall(query, key, value, head_map_of(tuple(kv_of_query), key.shape[1]), *options)


@lru_cache(maxsize=4096)
def head_map_of(kv_of_query: tuple[int, ...], kv_heads: int) -> HeadMap:
    """Checked once, not in every call of the operator."""
    return HeadMap(kv_of_query, kv_heads)


def _run(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    call = as_call(*args)
    found: tuple[Tensor, Tensor, Tensor] = choose("attention", call).run(call)
    return found


def _fake(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    query, value, stats = args[0], args[2], args[-1]
    batch, heads, length, _ = query.shape
    output = query.new_empty((batch, length, heads, value.shape[3])).transpose(1, 2)
    lse = query.new_empty((batch, heads, length), dtype=torch.promote_types(query.dtype, torch.float32))
    return output, lse, query.new_empty((6, batch, heads) if stats else (0,), dtype=torch.float32)


def _run_backward(grad_output: Tensor, output: Tensor, lse: Tensor, needs: Sequence[bool], *args: Any) -> tuple[Tensor, ...]:
    call = as_call(*args)
    grads = choose("attention_backward", call).run(call, grad_output, output, lse, tuple(needs))
    inputs = (call.query, call.key, call.value, call.bias, call.sinks, call.gate)
    return tuple(whole_gradient(call.query, grad, tensor) for grad, tensor in zip(grads, inputs))


def whole_gradient(query: Tensor, grad: Tensor | None, tensor: Tensor | None) -> Tensor:
    """What the operator returns for `tensor`: its gradient, or a tensor without elements where none was asked for."""
    return query.new_empty(0) if grad is None or tensor is None else laid_out_like(grad, tensor)


def laid_out_like(grad: Tensor, tensor: Tensor) -> Tensor:
    """`grad` with the strides that the fake promises, those of torch.empty_like(tensor); a copy only where it has others."""
    if grad.stride() == tensor.stride():
        return grad
    promised = torch.empty_like(tensor)
    return grad if grad.stride() == promised.stride() else promised.copy_(grad)


def _fake_backward(grad_output: Tensor, output: Tensor, lse: Tensor, needs: Sequence[bool], *args: Any) -> tuple[Tensor, ...]:
    tensors = (args[0], args[1], args[2], args[8], args[10], args[13])
    return tuple(torch.empty_like(tensor) if need else args[0].new_empty(0) for tensor, need in zip(tensors, needs))


def check_fixed_slopes(learning: bool) -> None:
    if learning:
        raise InvalidInput("alibi_slopes has no gradient; detach it, or give -slope * distance as a bias, which has one.")


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    check_fixed_slopes(ctx.needs_input_grad[9])
    ctx.mark_non_differentiable(output[1], output[2])
    query, key, value, kv_of_query, causal, window, scale, softcap, *tensors, _ = inputs
    ctx.options = (kv_of_query, causal, window, scale, softcap)
    ctx.save_for_backward(query, key, value, *tensors, output[0], output[1])


def _backward(ctx: Any, grad_output: Tensor, _lse: Tensor, _stats: Tensor) -> tuple[Any, ...]:
    query, key, value, *tensors, output, lse = ctx.saved_tensors
    wanted = ctx.needs_input_grad
    needs = tuple(wanted[index] for index in (0, 1, 2, 8, 10, 13))
    args = (query, key, value, *ctx.options, *tensors, False)
    if torch.is_grad_enabled():  # to be differentiated in its turn, which kernels' gradients cannot be
        grads = attention_backward(as_call(*args), grad_output, needs, again=True)
    else:
        grads = torch.ops.headprune.attention_backward(grad_output, output, lse, list(needs), *args)
    dq, dk, dv, dbias, dsinks, dgate = (grad if need else None for grad, need in zip(grads, needs))
    return dq, dk, dv, None, None, None, None, None, dbias, None, dsinks, None, None, dgate, None


for _name, _function, _shape in (("attention", _run, _fake), ("attention_backward", _run_backward, _fake_backward)):
    for _device in ("CPU", "CUDA"):
        library.impl(_name, _function, _device)
    torch.library.register_fake(f"headprune::{_name}", _shape, lib=library)
torch.library.register_autograd("headprune::attention", _backward, setup_context=_setup_context, lib=library)
