"""The C++ kernels for the CPU (csrc/cpu), behind the operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from headprune.ops.backend import Implementation, register
from headprune.ops.call import AttentionCall, DecodeCall, VarlenCall, operands
from headprune.ops.extension import cpu_extension
from headprune.ops.weight_slices import WeightCall
from headprune.ops.weight_stats import weight_operands

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # computed in fp32


def missing() -> str | None:
    reason = cpu_extension().reason
    return reason and f"the C++ extension is {reason}" if reason and reason.startswith("not built") else reason


def refuses(call: AttentionCall | VarlenCall | DecodeCall) -> str | None:
    if call.query.device.type != "cpu":
        return f"runs CPU tensors, not {call.query.device.type}"
    if call.query.dtype not in (*_DTYPES, torch.float64):
        return f"runs fp32, bf16, fp16 and fp64, not {call.query.dtype}"
    if call.query.dtype == torch.float64 and not hasattr(torch.ops.headprune_cpu_fp64, "attention"):
        return "was built from older sources, without fp64: build it again (python setup.py build_ext --inplace)"
    return None


def kernels(query: Tensor) -> Any:
    """The operators that compute in fp64, or those that compute in fp32."""
    return torch.ops.headprune_cpu_fp64 if query.dtype == torch.float64 else torch.ops.headprune_cpu


def attention_forward(call: AttentionCall) -> tuple[Tensor, Tensor, Tensor]:
    found: tuple[Tensor, Tensor, Tensor] = kernels(call.query).attention.default(*operands(call))
    return found


def attention_backward(
    call: AttentionCall, grad_output: Tensor, output: Tensor, lse: Tensor, needs: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    grads: tuple[Tensor | None, ...] = kernels(call.query).attention_backward.default(
        grad_output,
        output,
        lse,
        needs,
        call.query,
        call.key,
        call.value,
        call.head_map.kv_of_query,
        call.causal,
        call.window,
        call.scale,
        call.softcap,
        call.bias,
        call.alibi_slopes,
        call.sinks,
        call.key_mask,
        call.gate,
    )
    return grads


def varlen_options(call: VarlenCall) -> tuple[Any, ...]:
    return (
        call.query,
        call.key,
        call.value,
        call.cu_seqlens_q,
        call.cu_seqlens_k,
        call.head_map.kv_of_query,
        call.causal,
        call.window,
        call.scale,
        call.softcap,
        call.alibi_slopes,
        call.sinks,
        call.gate,
    )


def attention_varlen_forward(call: VarlenCall) -> tuple[Tensor, Tensor, Tensor]:
    found: tuple[Tensor, Tensor, Tensor] = kernels(call.query).attention_varlen.default(*varlen_options(call), call.stats)
    return found


def attention_varlen_backward(
    call: VarlenCall, grad_output: Tensor, output: Tensor, lse: Tensor, needs: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    backward = kernels(call.query).attention_varlen_backward.default
    grads: tuple[Tensor | None, ...] = backward(grad_output, output, lse, needs, *varlen_options(call))
    return grads


def attention_decode(call: DecodeCall) -> Tensor:
    output: Tensor = kernels(call.query).attention_decode.default(*operands(call))
    return output


def missing_weights() -> str | None:
    if missing() is None and not hasattr(torch.ops.headprune_cpu, "head_weight_stats"):
        return "the C++ extension is older than this source; run `python setup.py build_ext --inplace`"
    return missing()


def refuses_weights(call: WeightCall) -> str | None:
    if call.device.type != "cpu":
        return f"runs CPU tensors, not {call.device.type}"
    if call.dtype not in _DTYPES:
        return f"runs fp32, bf16 and fp16, not {call.dtype}"
    return None


def head_weight_stats(call: WeightCall) -> Tensor:
    packed: Tensor = torch.ops.headprune_cpu.head_weight_stats.default(*weight_operands(call.readable()))
    return packed


def register_cpp() -> None:
    runs: dict[str, Callable[..., Any]] = {
        "attention": attention_forward,
        "attention_backward": attention_backward,
        "attention_varlen": attention_varlen_forward,
        "attention_varlen_backward": attention_varlen_backward,
        "attention_decode": attention_decode,
    }
    for operator, run in runs.items():
        register(operator, Implementation("cpp", run, refuses, missing))
    register("head_weight_stats", Implementation("cpp", head_weight_stats, refuses_weights, missing_weights))
