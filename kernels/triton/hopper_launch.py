"""Launches the warp-specialised forward for Hopper: what it takes, its tile sizes, its tensor descriptors."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from headprune.kernels.attention_forward_hopper import ROWS, WARP_ROWS, attention_forward_hopper_kernel
from headprune.kernels.head_statistics import empty_partials, statistics_launch
from headprune.kernels.hopper_schedule import pair_rounds, rest_of_tiles
from headprune.kernels.launch import AotVariant, Launch, head_table

LOG2E = math.log2(math.e)
GLUON_TYPES = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16}


@dataclass(frozen=True)
class Tiles:
    """block_n: keys of a block; stages, q_stages: buffers of k, v and of q; consumers: warpgroups of 64 query rows, 2 or 3."""

    block_n: int
    stages: int
    q_stages: int
    consumers: int

    @property
    def registers(self) -> int:
        """Per thread of a consumer: what 65536 registers leave when the producer's warpgroup keeps 24."""
        return 240 if self.consumers == 2 else 160


TILES = {64: Tiles(128, 3, 2, 2), 128: Tiles(128, 2, 2, 2)}
# What else compiles without spilling: the candidates of bench/bench_gpu_hopper.py.
CANDIDATES = {64: (TILES[64], Tiles(128, 2, 2, 2), Tiles(64, 4, 2, 3)), 128: (TILES[128], Tiles(64, 4, 2, 2))}


def unfit(name: str, tensor: Tensor) -> str | None:
    """Why the copy engine cannot take `tensor` [batch, heads, length, dim], or None."""
    if tensor.stride(3) != 1 or tensor.data_ptr() % 16:
        return f"{name}'s last dimension is not contiguous and 16-byte aligned"
    steps = [stride * tensor.element_size() for size, stride in zip(tensor.shape[:3], tensor.stride()) if size > 1]
    if any(step % 16 or not 0 < step < 2**40 for step in steps):
        return f"{name}'s strides {list(tensor.stride())} are not positive multiples of 16 bytes"
    return None


def descriptor(tensor: Tensor, rows: int) -> TensorDescriptor:
    """Boxes of `rows` rows of one head of one sample; what lies outside reads as 0 and is not written."""
    dim = tensor.shape[3]
    # The stride of a dimension of size 1 may be anything, and is never used.
    strides = [stride if size > 1 else dim for size, stride in zip(tensor.shape, tensor.stride())]
    block = [1, 1, rows, dim]
    layout = gl.NVMMASharedLayout.get_default_for(block, GLUON_TYPES[tensor.dtype])
    return TensorDescriptor(tensor, list(tensor.shape), [*strides[:3], 1], block, layout)


def attention_forward_hopper(query: Tensor, *tensors, **options) -> None:
    """Runs `hopper_launches` on the device of query."""
    with torch.cuda.device(query.device):
        for launch in hopper_launches(query, *tensors, **options):
            launch.run()


def hopper_launches(
    query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor, kv_of_query: tuple[int, ...],
    *, causal: bool, scale: float, gate: Tensor | None, stats: Tensor | None = None, tiles: Tiles | None = None,
    programs: int | None = None,
) -> list[Launch]:  # fmt: skip
    """Fill output [batch, query_heads, query_len, dim], lse fp32 [batch, query_heads, query_len], contiguous, and, where given,
    stats fp32 [6, batch, query_heads].

    query [batch, query_heads, query_len, dim], key, value [batch, kv_heads, kv_len, dim]: fp16 or bf16, dim 64 or 128, no empty
    dimension, fit for the copy engine (`unfit`), as is output. scale > 0. gate [query_heads] or [batch, query_heads]. programs:
    how many run at once, by default one per multiprocessor.
    """
    batch, heads, q_len, dim = query.shape
    kv_len = key.shape[2]
    tiles = tiles or TILES[dim]
    row_blocks = -(-q_len // (tiles.consumers * ROWS.value))
    programs = min(programs or multiprocessors(query.device), batch * heads * row_blocks)
    table = rest_of_tiles(
        batch * heads, row_blocks, tiles.consumers * ROWS.value, kv_len - q_len if causal else None, kv_len, programs, query.device
    )  # fmt: skip
    parts = row_blocks * tiles.consumers * (ROWS.value // WARP_ROWS.value)
    partials = None if stats is None else empty_partials(stats, parts)
    arguments = {
        "q_desc": descriptor(query, ROWS.value), "k_desc": descriptor(key, tiles.block_n),
        "v_desc": descriptor(value, tiles.block_n), "o_desc": descriptor(output, ROWS.value), "o_ptr": output, "lse_ptr": lse,
        "gate_ptr": lse if gate is None else gate, "kv_of_query_ptr": head_table(kv_of_query, query.device),
        "k_ptr": key, "partial_ptr": lse if partials is None else partials, "stride_kb": key.stride(0), "stride_kh": key.stride(1),
        "parts": parts, "stride_gb": gate.stride(0) if gate is not None and gate.dim() == 2 else 0, "stride_ob": output.stride(0),
        "stride_oh": output.stride(1), "stride_om": output.stride(2), "heads": heads, "batch_heads": batch * heads,
        "row_blocks": row_blocks, "q_len": q_len, "kv_len": kv_len,
        "table_ptr": table, "rounds": pair_rounds(batch * heads, row_blocks, programs), "rest": table.shape[1],
        "scale": scale * LOG2E,
    }  # fmt: skip
    constants = {
        "BLOCK_N": tiles.block_n, "STAGES": tiles.stages, "Q_STAGES": tiles.q_stages, "CONSUMERS": tiles.consumers,
        "CAUSAL": causal, "HAS_GATE": gate is not None, "STATS": stats is not None, "REGISTERS": tiles.registers,
    }  # fmt: skip
    launches = [Launch(attention_forward_hopper_kernel, (programs,), arguments, constants, warps=4, stages=1)]
    return launches if stats is None else [*launches, statistics_launch(partials, stats, WARP_ROWS.value, None)]


@lru_cache(maxsize=64)
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def aot_variants(capability: int) -> Iterator[AotVariant]:
    if capability != 90:
        return
    for dim, candidates in CANDIDATES.items():
        for tiles in candidates:
            yield variant(dim, tiles, torch.bfloat16, causal=True, gated=False)
        yield variant(dim, TILES[dim], torch.float16, causal=False, gated=True)
        for causal in (True, False):
            yield variant(dim, TILES[dim], torch.bfloat16, causal=causal, gated=False, statistics=True)


def variant(dim: int, tiles: Tiles, dtype: torch.dtype, *, causal: bool, gated: bool, statistics: bool = False) -> AotVariant:
    query, key, value, output = (
        torch.empty(2, 4096, heads, dim, device="meta", dtype=dtype).transpose(1, 2) for heads in (4, 2, 2, 4)
    )
    lse, gate = torch.empty(2, 4, 4096, device="meta"), torch.empty(2, 4, device="meta") if gated else None
    stats = torch.empty(6, 2, 4, device="meta") if statistics else None
    launch = hopper_launches(
        query, key, value, output, lse, (0, 0, 0, 1), causal=causal, scale=dim**-0.5, gate=gate, stats=stats, tiles=tiles,
        programs=132,
    )[0]  # fmt: skip
    shape = f"{64 * tiles.consumers}x{tiles.block_n} q{tiles.q_stages} kv{tiles.stages}"
    options = ["causal"] * causal + ["gated"] * gated + ["statistics"] * statistics
    return AotVariant(
        " ".join(["attention_forward_hopper", {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype], f"d{dim}", *options, shape]),
        launch,
    )
