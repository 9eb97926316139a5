"""The C++ kernels for the CPU (csrc/cpu), behind the operators."""

from __future__ import annotations

import torch
from torch import Tensor

from headprune.ops.backend import Implementation, register
from headprune.ops.call import AttentionCall
from headprune.ops.extension import cpu_extension

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def missing() -> str | None:
    reason = cpu_extension().reason
    return reason and f"the C++ extension is {reason}" if reason and reason.startswith("not built") else reason


def refuses(call: AttentionCall) -> str | None:
    if call.query.device.type != "cpu":
        return f"runs CPU tensors, not {call.query.device.type}"
    if call.query.dtype not in _DTYPES:
        return f"runs fp32, bf16 and fp16, not {call.query.dtype}"
    return None


def attention_forward(call: AttentionCall) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.headprune_cpu.attention.default(
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
        call.query_mask,
        call.gate,
        call.stats,
    )


def attention_backward(
    call: AttentionCall, grad_output: Tensor, output: Tensor, lse: Tensor, needs: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    return torch.ops.headprune_cpu.attention_backward.default(
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


def register_cpp() -> None:
    register("attention", Implementation("cpp", attention_forward, refuses, missing))
    register("attention_backward", Implementation("cpp", attention_backward, refuses, missing))
