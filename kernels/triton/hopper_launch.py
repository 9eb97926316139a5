"""Launches the warp-specialised forward for Hopper: what it takes, its tile sizes, its tensor descriptors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from headprune.kernels.attention_forward_hopper import ROWS, attention_forward_hopper_kernel
from torch import Tensor

from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

LOG2E = math.log2(math.e)
SECTION_BYTES = 24 << 20  # keys and values that stay in L2 (50 MB) together, next to queries and outputs
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
CANDIDATES = {64: (TILES[64], Tiles(128, 2, 1, 2), Tiles(64, 4, 2, 3)), 128: (TILES[128], Tiles(128, 2, 1, 2), Tiles(64, 4, 2, 2))}


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


def attention_forward_hopper(
    query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor, kv_of_query: tuple[int, ...],
    *, causal: bool, scale: float, gate: Tensor | None, tiles: Tiles | None = None, programs: int | None = None,
) -> None:  # fmt: skip
    """Fills output [batch, query_heads, query_len, dim] and lse fp32 [batch, query_heads, query_len], contiguous.

    query [batch, query_heads, query_len, dim], key, value [batch, kv_heads, kv_len, dim]: fp16 or bf16, dim 64 or 128, no empty
    dimension, fit for the copy engine (`unfit`), as is output. scale > 0. gate [query_heads] or [batch, query_heads]. programs:
    how many run at once, by default one per multiprocessor.
    """
    batch, heads, q_len, dim = query.shape
    kv_heads, kv_len = key.shape[1:3]
    tiles = tiles or TILES[dim]
    row_blocks = -(-q_len // (tiles.consumers * ROWS.value))
    programs = min(programs or multiprocessors(query.device), batch * heads * row_blocks)
    attention_forward_hopper_kernel[(programs,)](
        descriptor(query, ROWS.value), descriptor(key, tiles.block_n), descriptor(value, tiles.block_n),
        descriptor(output, ROWS.value), output, lse, lse if gate is None else gate, head_table(kv_of_query, query.device),
        gate.stride(0) if gate is not None and gate.dim() == 2 else 0, *output.stride()[:3],
        heads, batch * heads, row_blocks, q_len, kv_len, section(batch * heads, heads / kv_heads, kv_len * dim, causal),
        scale * LOG2E, BLOCK_N=tiles.block_n, STAGES=tiles.stages, Q_STAGES=tiles.q_stages, CONSUMERS=tiles.consumers,
        CAUSAL=causal, HAS_GATE=gate is not None, REGISTERS=tiles.registers, num_warps=4,
    )  # fmt: skip


def section(batch_heads: int, group: float, elements: int, causal: bool) -> int:
    """How many query heads are worked on together (`place_of`): under a causal mask as many as L2 has room for, so that the
    longest blocks of all of them come first; else one after the other."""
    if not causal:
        return 1
    return max(1, min(batch_heads, int(SECTION_BYTES / (4 * elements) * group)))


@lru_cache(maxsize=64)
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@lru_cache(maxsize=512)
def head_table(kv_of_query: tuple[int, ...], device: torch.device) -> Tensor:
    """The head map on the device, int32 [query_heads]."""
    return torch.tensor(kv_of_query, dtype=torch.int32, device=device)
