"""The Triton kernels, behind the operators."""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

from headprune.ops.backend import Implementation, register
from headprune.ops.call import AttentionCall

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def missing() -> str | None:
    return None if importlib.util.find_spec("triton") else "triton is not installed"


def interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def refuses(call: AttentionCall) -> str | None:
    if call.query.device.type != "cuda" and not interpreted():
        return f"a {call.query.device.type} tensor"
    if call.query.dtype not in DTYPES:
        return f"{call.query.dtype} is not supported"
    if interpreted() and call.query.dtype == torch.bfloat16:
        return "bf16 is wrong in Triton's interpreter"
    if max(call.query.shape[3], call.value_dim) > 256:
        return "head_dim above 256"
    options = {"window": call.window, "softcap": call.softcap, "stats": call.stats}
    tensors = {"bias": call.bias, "alibi_slopes": call.alibi_slopes, "sinks": call.sinks}
    used = [name for name, value in options.items() if value] + [name for name, value in tensors.items() if value is not None]
    return f"no {', '.join(used)} in the kernel yet" if used else None


def attention_forward(call: AttentionCall) -> tuple[Tensor, Tensor, Tensor]:
    from headprune.kernels.attention_forward import attention_forward as launch

    output, lse = call.empty_output(), call.empty_lse()
    query, key, value = (tensor if tensor.stride(3) == 1 else tensor.contiguous() for tensor in (call.query, call.key, call.value))
    if output.numel():
        launch(
            query, key, value, output, lse, call.head_map.kv_of_query,
            causal=call.causal, scale=call.scale, key_mask=call.key_mask, gate=call.gate,
        )  # fmt: skip
    return output, lse, call.empty_stats()


def register_triton() -> None:
    register("attention", Implementation("triton", attention_forward, refuses, missing))
