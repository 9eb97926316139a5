"""The Triton kernel for weight statistics, behind the operator."""

from __future__ import annotations

import torch
from torch import Tensor

from headprune.ops import triton
from headprune.ops.backend import Implementation, register
from headprune.ops.weight_slices import WeightCall


def refuses(call: WeightCall) -> str | None:
    if call.device.type != "cuda" and not triton.interpreted():
        return f"a {call.device.type} tensor"
    if call.dtype not in triton.DTYPES:
        return f"{call.dtype} is not supported"
    if triton.interpreted() and call.dtype == torch.bfloat16:
        return "bf16 is wrong in Triton's interpreter"
    return None


def head_weight_stats(call: WeightCall) -> Tensor:
    from headprune.kernels.weight_stats import weight_stats

    call = call.readable()
    stats = call.weights[0].new_empty((call.statistics, call.heads), dtype=torch.float32)
    weight_stats(call.weights, call.grads, call.dims, call.spans, stats)
    return stats


def register_weights() -> None:
    register("head_weight_stats", Implementation("triton", head_weight_stats, refuses, triton.missing))
