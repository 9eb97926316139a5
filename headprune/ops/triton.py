"""The Triton kernels, behind the operators."""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

from headprune.kernels.launch import capability_of
from headprune.ops.backend import Implementation, register
from headprune.ops.call import AttentionCall, VarlenCall

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MOST_DIM = 256
# Elements from one row to the next: 32 bits lead from the first of a tile's rows, 128 at most, to the others.
FARTHEST_ROW = 1 << 24


def missing() -> str | None:
    return None if importlib.util.find_spec("triton") else "triton is not installed"


def interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def unsuited(device: torch.device) -> str | None:
    """Why the tiles of attention do not fit a GPU: older ones have 64 KB of shared memory, as AMD's do."""
    if device.type != "cuda":
        return None
    if torch.version.hip:
        return "has tiles for NVIDIA's GPUs alone"
    return None if capability_of(device) >= 80 else f"runs on compute capability 8.0 and newer, not {capability_of(device) / 10}"


def refuses(call: AttentionCall | VarlenCall) -> str | None:
    query = call.query
    if query.device.type != "cuda" and not interpreted():
        return f"a {query.device.type} tensor"
    if reason := unsuited(query.device):
        return reason
    if query.dtype not in DTYPES:
        return f"{query.dtype} is not supported"
    if interpreted() and query.dtype == torch.bfloat16:
        return "bf16 is wrong in Triton's interpreter"
    if not 1 <= min(query.shape[-1], call.value_dim) <= max(query.shape[-1], call.value_dim) <= MOST_DIM:
        return f"head_dim {query.shape[-1]} and value_dim {call.value_dim}; the kernel takes 1 to {MOST_DIM}"
    return None


def attention_forward(call: AttentionCall) -> tuple[Tensor, Tensor, Tensor]:
    from headprune.kernels.attention_forward import attention_forward as launch

    output, lse, stats = call.empty_output(), call.empty_lse(), call.empty_stats()
    if output.numel() == 0:
        return output, lse, without_rows(stats)
    launch(
        *(dense_rows(tensor) for tensor in (call.query, call.key, call.value)), output, lse, stats if call.stats else None,
        call.head_map.kv_of_query, causal=call.causal, window=call.window, scale=call.scale, softcap=call.softcap, bias=call.bias,
        alibi_slopes=call.alibi_slopes, sinks=call.sinks, key_mask=call.key_mask, query_mask=call.query_mask, gate=call.gate,
    )  # fmt: skip
    return output, lse, stats


def attention_varlen_forward(call: VarlenCall) -> tuple[Tensor, Tensor, Tensor]:
    from headprune.kernels.attention_forward import attention_forward as launch

    # Tokens behind the last sequence belong to nobody and are written by no tile.
    output, lse, stats = call.empty_output().zero_(), call.empty_lse().fill_(float("-inf")), call.empty_stats()
    if output.numel() == 0 or call.sequences < 1 or call.max_q < 1:
        return output, lse, without_rows(stats)
    query, key, value, rows = (
        dense_rows(tensor, 0).transpose(0, 1)[None] for tensor in (call.query, call.key, call.value, output)
    )  # fmt: skip
    launch(
        query, key, value, rows, lse[None], stats if call.stats else None, call.head_map.kv_of_query, causal=call.causal,
        window=call.window, scale=call.scale, softcap=call.softcap, alibi_slopes=call.alibi_slopes, sinks=call.sinks,
        gate=call.gate, cu_seqlens=(call.cu_seqlens_q, call.cu_seqlens_k), longest=(call.max_q, call.max_k),
    )  # fmt: skip
    return output, lse, stats


def dense_rows(tensor: Tensor, rows: int = 2) -> Tensor:
    """The tensor itself where its last stride is 1 and those of dimension `rows` are near each other, else a copy."""
    return tensor if tensor.stride(-1) == 1 and tensor.stride(rows) <= FARTHEST_ROW else tensor.contiguous()


def without_rows(stats: Tensor) -> Tensor:
    """Statistics [6, ...] of heads without a query: 0, and -inf as the largest logit."""
    stats.zero_()
    if stats.dim() == 3:
        stats[2] = float("-inf")
    return stats


def register_triton() -> None:
    register("attention", Implementation("triton", attention_forward, refuses, missing))
    register("attention_varlen", Implementation("triton", attention_varlen_forward, refuses, missing))
