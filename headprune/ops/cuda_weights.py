"""The CUDA kernel for weight statistics, behind the operator."""

from __future__ import annotations

import torch
from torch import Tensor

from headprune.kernels.weight_plan import address_table, addresses_of, chunk_plan, matrices_of, row_length
from headprune.ops.backend import Implementation, register
from headprune.ops.cuda import missing, unsuited
from headprune.ops.weight_slices import WeightCall
from headprune.ops.weight_table import faster_weight_backend

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def refuses(call: WeightCall) -> str | None:
    if call.device.type != "cuda":
        return f"a {call.device.type} tensor"
    if reason := unsuited(call.device):
        return reason
    return None if call.dtype in _DTYPES else f"runs fp32, bf16 and fp16, not {call.dtype}"


def slower(call: WeightCall) -> str | None:
    """Why not, where nobody asked for this backend by name."""
    reason = refuses(call)
    if reason is None and faster_weight_backend(call) != "cuda":
        return "the Triton kernel is the faster one for this dtype (weight_table.py)"
    return reason


def head_weight_stats(call: WeightCall) -> Tensor:  # pragma: no cover (needs a CUDA device)
    call = call.readable()
    matrices = matrices_of(call.weights, call.dims)
    plan = chunk_plan(matrices, call.spans, call.heads, row_length(matrices, call.spans), call.device)
    places, grad_places = addresses_of(call.weights), addresses_of(call.grads)
    whole = plan.whole if all(place % 16 == 0 for place in places + grad_places) else 1
    packed: Tensor = torch.ops.headprune_cuda.head_weight_stats.default(
        address_table(places, call.device),
        address_table(grad_places, call.device) if call.grads else None,
        call.dtype,
        plan.table,
        plan.offsets,
        whole,
    )
    return packed


def register_where_faster() -> None:
    register("head_weight_stats", Implementation("cuda", head_weight_stats, slower, missing))


def register_where_asked_for() -> None:
    register("head_weight_stats", Implementation("cuda", head_weight_stats, refuses, missing))
