"""What `make aot` compiles of the forward kernel: every head_dim tile, and each option once where it costs most."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from headprune.kernels.attention_forward import forward_launches
from headprune.kernels.launch import AotVariant, Launch


def aot_variants(capability: int) -> Iterator[AotVariant]:
    yield from (variant(capability, dim, causal) for dim in (64, 128) for causal in (False, True))
    yield from (variant(capability, dim, True) for dim in (80, 96, 256))
    yield variant(capability, 128, True, "statistics")
    yield variant(capability, 128, True, "bias")
    yield variant(capability, 64, True, "packed, window")
    yield variant(capability, 64, True, "everything")
    yield variant(capability, 64, False, dtype=torch.float32)
    yield variant(capability, 128, True, dtype=torch.float32)
    statistics = launches(capability, 64, False, "statistics", torch.bfloat16)[1]
    yield AotVariant("head_statistics", statistics, tensor_cores=False)


def variant(capability: int, dim: int, causal: bool, option: str = "", dtype: torch.dtype = torch.bfloat16) -> AotVariant:
    name = "fp32" if dtype == torch.float32 else "bf16"
    label = " ".join(["attention_forward", name, f"d{dim}", *["causal"] * causal, *[option] * bool(option)])
    return AotVariant(label, launches(capability, dim, causal, option, dtype)[0], tensor_cores=dtype != torch.float32)


def launches(capability: int, dim: int, causal: bool, option: str, dtype: torch.dtype) -> list[Launch]:
    batch, heads, kv_heads, length = 2, 24, 8, 4096

    def empty(*shape: int, of: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, device="meta", dtype=of)

    bias, mask = empty(batch, heads, length, length), empty(batch, length, of=torch.bool)
    options = {
        "bias": {"bias": bias},
        "packed, window": {"window": 1024, "cu_seqlens": (empty(9, of=torch.int32),) * 2, "longest": (length, length)},
        "everything": {
            "window": 1024, "softcap": 50.0, "bias": bias, "alibi_slopes": empty(heads), "sinks": empty(heads), "key_mask": mask,
            "query_mask": mask, "gate": empty(batch, heads),
        },
    }.get(option, {})  # fmt: skip
    stats = empty(6, 8 if "cu_seqlens" in options else batch, heads) if option in ("statistics", "everything") else None
    samples = 1 if "cu_seqlens" in options else batch
    query, key, value, output = (
        empty(samples, length, count, dim, of=dtype).transpose(1, 2) for count in (heads, kv_heads, kv_heads, heads)
    )  # fmt: skip
    kv_of_query = tuple(min(head // 2, kv_heads - 1) for head in range(heads))
    lse = empty(samples, heads, length)
    return forward_launches(
        query, key, value, output, lse, stats, kv_of_query, capability, causal=causal, scale=dim**-0.5, **options
    )  # fmt: skip
