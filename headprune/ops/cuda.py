"""The CUDA kernels (csrc/cuda), behind the operators."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from headprune.kernels.decode_plan import multiprocessors, split_count, tile_table
from headprune.kernels.launch import capability_of
from headprune.ops.backend import Implementation, register
from headprune.ops.call import DecodeCall
from headprune.ops.decode_table import faster_backend
from headprune.ops.extension import cuda_extension

_DTYPES = (torch.float16, torch.bfloat16)
_HEAD_DIMS = (64, 96, 128)
_TILE_ROWS = 16  # kTileRows of csrc/cuda/decode.h
_SHARED_BYTES = {64: 57648, 96: 83248, 128: 108848}  # Layout<head_dim>::bytes of csrc/cuda/decode_kernel.cuh


def missing() -> str | None:
    return cuda_extension().reason


def refuses(call: DecodeCall) -> str | None:
    if call.query.device.type != "cuda":
        return f"a {call.query.device.type} tensor"
    return unsuited(call.query.device, call.query.shape[3]) or refuses_tensors(call)


def unsuited(device: torch.device, head_dim: int = 0) -> str | None:
    """Why the kernels do not run on a GPU: they are compiled for 8.0 and newer, and a block of decode needs its shared memory."""
    if capability_of(device) < 80:
        return f"runs on compute capability 8.0 and newer, not {capability_of(device) / 10}"
    needs, has = _SHARED_BYTES.get(head_dim, 0), shared_bytes(device)
    return f"head_dim {head_dim} takes {needs} bytes of shared memory, this GPU has {has}" if needs > has else None


@lru_cache(maxsize=64)
def shared_bytes(device: torch.device) -> int:
    """What a block may have."""
    properties = torch.cuda.get_device_properties(device)
    return int(getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block))


def refuses_tensors(call: DecodeCall) -> str | None:
    if call.query.dtype not in _DTYPES:
        return f"runs fp16 and bf16, not {call.query.dtype}"
    head_dim = call.query.shape[3]
    if head_dim not in _HEAD_DIMS or call.value_dim != head_dim:
        return f"runs head_dim 64, 96 and 128, the same for the values, not head_dim {head_dim} and value_dim {call.value_dim}"
    for name, cache in (("key_cache", call.key_cache), ("value_cache", call.value_cache)):
        if cache.stride(3) != 1 or any(stride % 8 for stride in cache.stride()[:3]) or cache.data_ptr() % 16:
            return f"the rows of {name} are not 16-byte aligned (strides {list(cache.stride())})"
    return None


def slower(call: DecodeCall) -> str | None:
    """Why not, where nobody asked for this backend by name."""
    reason = refuses(call)
    if reason is None and faster_backend(call) != "cuda":
        return "the Triton kernel is the faster one for this shape (decode_table.py)"
    return reason


def attention_decode(call: DecodeCall, splits: int | None = None) -> Tensor:  # pragma: no cover (needs a CUDA device)
    """As the operator; `splits`: at most so many for the keys of a sample, by default as many as fill the GPU."""
    if not call.query.numel():
        return call.empty_output()
    tiles = tile_table(call.head_map.group_offsets, call.new, _TILE_ROWS, call.query.device)
    if splits is None:
        splits = split_count(call.batch * tiles.shape[0], call.capacity, 2 * multiprocessors(call.query.device))
    output: Tensor = torch.ops.headprune_cuda.attention_decode.default(
        call.query,
        call.key_cache,
        call.value_cache,
        call.lengths,
        call.page_table,
        tiles,
        splits,
        call.window,
        call.scale,
        call.softcap,
        call.alibi_slopes,
        call.sinks,
        call.key_mask,
        call.gate,
    )
    return output


def register_where_faster() -> None:
    register("attention_decode", Implementation("cuda", attention_decode, slower, missing))


def register_where_asked_for() -> None:
    register("attention_decode", Implementation("cuda", attention_decode, refuses, missing))
