"""The Triton decode kernel, behind attention_decode and, for a few queries on many keys, behind attention."""

from __future__ import annotations

import torch
from torch import Tensor

from headprune.ops import triton
from headprune.ops.backend import Implementation, register
from headprune.ops.call import MOST_NEW_TOKENS, AttentionCall, DecodeCall

# From here on splitting the keys and reading them once for a whole group is worth a second launch. Not measured yet.
MANY_KEYS = 512


def refuses(call: DecodeCall) -> str | None:
    return refuses_tensors(call.query, call.key_cache, call.value_cache)


def refuses_tensors(query: Tensor, key: Tensor, value: Tensor) -> str | None:
    if query.device.type != "cuda" and not triton.interpreted():
        return f"a {query.device.type} tensor"
    if reason := triton.unsuited(query.device):
        return reason
    if query.dtype not in triton.DTYPES:
        return f"{query.dtype} is not supported"
    if triton.interpreted() and query.dtype == torch.bfloat16:
        return "bf16 is wrong in Triton's interpreter"
    if max(query.shape[3], value.shape[3]) > 256:
        return "head_dim above 256"
    return strided("key", key) or strided("value", value)


def strided(name: str, cache: Tensor) -> str | None:
    """Why a cache cannot be read row by row; it is never copied."""
    if cache.stride(3) != 1 and cache.shape[3] > 1:
        return f"the last stride of the {name} cache is {cache.stride(3)}, not 1"
    if cache.stride(2) > triton.FARTHEST_ROW:
        return f"the keys of the {name} cache are {cache.stride(2)} elements apart, more than {triton.FARTHEST_ROW}"
    return None


def attention_decode(call: DecodeCall) -> Tensor:
    from headprune.kernels.attention_decode import attention_decode as launch

    output = call.empty_output()
    lse = call.query.new_empty((call.batch, call.query_heads, call.new), dtype=torch.float32)
    if output.numel():
        launch(
            rows_contiguous(call.query), call.key_cache, call.value_cache, output, lse, call.head_map.group_offsets,
            lengths=call.lengths.contiguous(), page_table=rows_contiguous(call.page_table), key_mask=rows_contiguous(call.key_mask),
            window=call.window, scale=call.scale, softcap=call.softcap, alibi_slopes=rows_contiguous(call.alibi_slopes),
            sinks=rows_contiguous(call.sinks), gate=rows_contiguous(call.gate),
        )  # fmt: skip
    return output


def refuses_attention(call: AttentionCall) -> str | None:
    """An attention that decode computes: each query sees the keys up to its own position, aligned at the end."""
    if call.query_len > MOST_NEW_TOKENS or call.kv_len < MANY_KEYS:
        return f"decode is for up to {MOST_NEW_TOKENS} queries on {MANY_KEYS} keys and more"
    if not call.causal and call.query_len != 1:
        return "decode is causal"
    if call.bias is not None or call.stats:
        return "decode has no bias and no statistics"
    return refuses_tensors(call.query, call.key, call.value)


def attention_forward(call: AttentionCall) -> tuple[Tensor, Tensor, Tensor]:
    from headprune.kernels.attention_decode import attention_decode as launch

    output, lse = call.empty_output(), call.empty_lse()
    if output.numel():
        launch(
            rows_contiguous(call.query), call.key, call.value, output, lse, call.head_map.group_offsets,
            key_mask=rows_contiguous(call.key_mask), window=call.window, scale=call.scale, softcap=call.softcap,
            alibi_slopes=rows_contiguous(call.alibi_slopes), sinks=rows_contiguous(call.sinks), gate=rows_contiguous(call.gate),
        )  # fmt: skip
    return output, lse, call.empty_stats()


def rows_contiguous(tensor: Tensor | None) -> Tensor | None:
    """`tensor` with last stride 1; all that is ever copied here is small."""
    return tensor if tensor is None or tensor.stride(-1) == 1 else tensor.contiguous()


def register_attention() -> None:
    # A name of its own: forcing "triton" forces the kernel that takes every attention.
    register("attention", Implementation("triton-decode", attention_forward, refuses_attention, triton.missing))


def register_decode() -> None:
    register("attention_decode", Implementation("triton", attention_decode, refuses, triton.missing))
