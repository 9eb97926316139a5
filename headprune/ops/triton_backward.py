"""The Triton backward kernels, behind the operators."""

from __future__ import annotations

import torch
from torch import Tensor

from headprune.ops.backend import Implementation, register
from headprune.ops.call import AttentionCall, VarlenCall
from headprune.ops.triton import dense_rows, missing, refuses


def attention_backward(
    call: AttentionCall, grad_output: Tensor, output: Tensor, lse: Tensor, needs: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """Gradients of query, key, value, bias, sinks and gate, each in its tensor's dtype; None where `needs` says no."""
    from headprune.kernels.attention_backward import Needs, Problem, attention_backward

    inputs = (call.query, call.key, call.value, call.bias, call.sinks, call.gate)
    if call.query.numel() == 0 or call.key.numel() == 0:
        return zeros(inputs, needs)
    problem = Problem(
        *(dense_rows(tensor) for tensor in (call.query, call.key, call.value, output)), lse.contiguous(), dense_rows(grad_output),
        call.head_map.kv_of_query, causal=call.causal, window=call.window, scale=call.scale, softcap=call.softcap, bias=call.bias,
        alibi_slopes=call.alibi_slopes, sinks=call.sinks, key_mask=call.key_mask, gate=call.gate,
    )  # fmt: skip
    grads: tuple[Tensor | None, ...] = attention_backward(problem, Needs(*needs))
    return grads


def attention_varlen_backward(
    call: VarlenCall, grad_output: Tensor, output: Tensor, lse: Tensor, needs: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """Gradients of query, key, value, sinks and gate, each in its tensor's dtype; None where `needs` says no."""
    from headprune.kernels.attention_backward import Needs, Problem, attention_backward

    inputs = (call.query, call.key, call.value, call.sinks, call.gate)
    if call.query.numel() == 0 or call.key.numel() == 0 or call.sequences < 1 or min(call.max_q, call.max_k) < 1:
        return zeros(inputs, needs)
    tensors = (call.query, call.key, call.value, output, grad_output)
    query, key, value, output, grad_output = (dense_rows(tensor, 0).transpose(0, 1)[None] for tensor in tensors)
    problem = Problem(
        query, key, value, output, lse.contiguous()[None], grad_output, call.head_map.kv_of_query, causal=call.causal,
        window=call.window, scale=call.scale, softcap=call.softcap, alibi_slopes=call.alibi_slopes, sinks=call.sinks,
        gate=call.gate, cu_seqlens=(call.cu_seqlens_q, call.cu_seqlens_k), longest=(call.max_q, call.max_k),
    )  # fmt: skip
    needs_query, needs_key, needs_value, needs_sinks, needs_gate = needs
    dq, dk, dv, _, dsinks, dgate = attention_backward(
        problem, Needs(needs_query, needs_key, needs_value, False, needs_sinks, needs_gate)
    )
    tokens = (None if grad is None else grad[0].transpose(0, 1) for grad in (dq, dk, dv))
    return *tokens, dsinks, dgate


def zeros(inputs: tuple[Tensor | None, ...], needs: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    return tuple(None if tensor is None or not need else torch.zeros_like(tensor) for tensor, need in zip(inputs, needs))


def register_triton_backward() -> None:
    register("attention_backward", Implementation("triton", attention_backward, refuses, missing))
    register("attention_varlen_backward", Implementation("triton", attention_varlen_backward, refuses, missing))
