"""The backward pass: delta, then dK/dV over key blocks and dQ over query blocks, each only where it is asked for.

Everything is recomputed from the saved lse; no [query_len, kv_len] matrix exists, except for the gradient of a bias.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from headprune.kernels.aligned import aligned, concerned, narrowed
from headprune.kernels.attention_closed_gate import PROGRAMS, closed_gate_kernel
from headprune.kernels.attention_delta import delta_kernel
from headprune.kernels.attention_dkdv import dkdv_kernel
from headprune.kernels.attention_dq import dq_kernel
from headprune.kernels.attention_forward import contiguous, strides
from headprune.kernels.backward_tiles import ROWS_OF_DELTA, closed_gate_tile, dkdv_tile, dq_tile
from headprune.kernels.cached_table import cached_table
from headprune.kernels.launch import Launch, as_bytes, capability_of, head_table, near
from headprune.kernels.scores import ADDED_BIAS, BOOL_BIAS, LOG2E, NO_BIAS, precise_tanh, split_dim
from headprune.kernels.tiles import Tile

MOST_SAMPLES = 65535


class Needs(NamedTuple):
    """Which gradients are asked for."""

    query: bool = False
    key: bool = False
    value: bool = False
    bias: bool = False
    sinks: bool = False
    gate: bool = False


@dataclass(frozen=True)
class Problem:
    """One forward attention, what it saved, and the gradient that came back.

    query [batch, query_heads, q_len, head_dim], key and value [batch, kv_heads, kv_len, ...], output (gated) and grad_output
    [batch, query_heads, q_len, value_dim], all with last stride 1; lse fp32 [batch, query_heads, q_len], last stride 1. Options
    as in headprune.ops.attention; window and softcap are 0 where off.
    With cu_seqlens (int32 [sequences + 1] of the queries and of the keys) batch is 1, the tokens of all sequences lie one after
    the other along q_len and kv_len, `longest` holds the longest lengths, and the gate counts sequences.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor
    lse: Tensor
    grad_output: Tensor
    kv_of_query: tuple[int, ...]
    causal: bool = False
    window: int = 0
    scale: float = 1.0
    softcap: float = 0.0
    bias: Tensor | None = None
    alibi_slopes: Tensor | None = None
    sinks: Tensor | None = None
    key_mask: Tensor | None = None
    gate: Tensor | None = None
    cu_seqlens: tuple[Tensor, Tensor] | None = None
    longest: tuple[int, int] | None = None

    @property
    def samples(self) -> int:
        return self.cu_seqlens[0].shape[0] - 1 if self.cu_seqlens else self.query.shape[0]

    def part(self, own: slice) -> Problem:
        """The samples `own` alone."""
        if own == slice(0, self.samples):
            return self
        gate = self.gate[own] if self.gate is not None and self.gate.dim() == 2 else self.gate
        if self.cu_seqlens:  # which counts from the first token of all
            starts = slice(own.start, own.stop + 1)
            return replace(self, cu_seqlens=(self.cu_seqlens[0][starts], self.cu_seqlens[1][starts]), gate=gate)
        names = ("query", "key", "value", "output", "lse", "grad_output")
        mask, bias = self.key_mask, self.bias
        return replace(
            self, **{name: getattr(self, name)[own] for name in names}, gate=gate, key_mask=None if mask is None else mask[own],
            bias=bias if bias is None or bias.dim() < 4 or bias.shape[0] == 1 else bias[own],
        )  # fmt: skip

    @property
    def heads(self) -> int:
        return self.query.shape[1]

    @property
    def lengths(self) -> tuple[int, int]:
        """Queries and keys of the longest sample."""
        return self.longest or (self.query.shape[2], self.key.shape[2])

    @property
    def dims(self) -> tuple[int, int]:
        return self.query.shape[3], self.value.shape[3]


def attention_backward(problem: Problem, needs: Needs) -> tuple[Tensor | None, ...]:
    """Gradients of query, key, value, bias, sinks and gate, each in its tensor's dtype; None where `needs` says no."""
    regular = in_regular_rows(problem) if concerned(problem.query) else problem
    grads = Gradients.allocate(regular, needs)
    for own in parts_of(regular.samples):
        for launch in backward_launches(regular.part(own), grads.part(regular, own), capability_of(problem.query.device)):
            launch.run()
    query, key, value, *rest = grads.finished(regular)
    head_dim, value_dim = problem.dims
    return narrowed(query, head_dim), narrowed(key, head_dim), narrowed(value, value_dim), *rest


def parts_of(samples: int) -> list[slice]:
    """The samples, as many at once as a grid holds beside its first dimension."""
    return [slice(first, min(first + MOST_SAMPLES, samples)) for first in range(0, samples, MOST_SAMPLES)]


def in_regular_rows(problem: Problem) -> Problem:
    query, key = aligned(problem.query, problem.key)
    value, output, grad_output = aligned(problem.value, problem.output, problem.grad_output)
    return replace(problem, query=query, key=key, value=value, output=output, grad_output=grad_output)


@dataclass(frozen=True)
class Gradients:
    """What the kernels write, None where nobody asks: query, key, value as their tensors; delta as lse; the gradients of bias
    [batch, query_heads, q_len, kv_len], sinks and gate [samples, query_heads, row blocks] fp32, not yet summed."""

    query: Tensor | None
    key: Tensor | None
    value: Tensor | None
    delta: Tensor | None
    bias: Tensor | None
    sinks: Tensor | None
    gate: Tensor | None

    @classmethod
    def allocate(cls, problem: Problem, needs: Needs) -> Gradients:
        def like(need: bool, tensor: Tensor) -> Tensor | None:
            # Tokens behind the last sequence belong to nobody and are written by no program.
            make = torch.zeros_like if problem.cu_seqlens else torch.empty_like
            if not need:
                return None
            grad = make(tensor)
            # Not of tensors whose rows lie over each other, one element apart.
            return grad if grad.stride(-1) == 1 else make(tensor, memory_format=torch.contiguous_format)

        def partial(need: bool) -> Tensor | None:
            shape = (problem.samples, problem.heads, triton.cdiv(problem.lengths[0], ROWS_OF_DELTA))
            return problem.lse.new_empty(shape) if need else None

        return cls(
            like(needs.query, problem.query), like(needs.key, problem.key), like(needs.value, problem.value),
            torch.empty_like(problem.lse) if needs.query or needs.key or needs.bias else None,
            problem.lse.new_zeros((problem.samples, problem.heads, *problem.lengths)) if needs.bias else None,
            partial(needs.sinks), partial(needs.gate),
        )  # fmt: skip

    def part(self, problem: Problem, own: slice) -> Gradients:
        """Of the samples `own` of `problem`."""
        if own == slice(0, problem.samples):
            return self
        tokens = ("query", "key", "value", "delta") if not problem.cu_seqlens else ()
        found = {name: getattr(self, name) for name in (*tokens, "bias", "sinks", "gate")}
        return replace(self, **{name: None if grad is None else grad[own] for name, grad in found.items()})

    def finished(self, problem: Problem) -> tuple[Tensor | None, ...]:
        bias, sinks, gate = self.bias, self.sinks, self.gate
        if bias is not None:
            bias = bias.sum_to_size(problem.bias.shape).to(problem.bias.dtype)
        if sinks is not None:
            sinks = sinks.sum(dim=(0, 2)).to(problem.sinks.dtype)
        if gate is not None:
            gate = gate.sum(dim=2 if problem.gate.dim() == 2 else (0, 2)).to(problem.gate.dtype)
        return self.query, self.key, self.value, bias, sinks, gate


def backward_launches(problem: Problem, grads: Gradients, capability: int) -> list[Launch]:
    """The kernels that fill `grads`, in order."""
    launches = []
    if not (grads.delta is grads.sinks is grads.gate is None):
        launches.append(delta_launch(problem, grads))
    if grads.gate is not None:
        launches.append(closed_gate_launch(problem, grads, closed_gate_tile(problem.query.dtype, max(problem.dims))))
    if not (grads.key is grads.value is None):
        launches.append(dkdv_launch(problem, grads, dkdv_tile(capability, problem.query.dtype, max(problem.dims))))
    if not (grads.query is grads.bias is None):
        tile = dq_tile(capability, problem.query.dtype, max(problem.dims), problem.bias is not None)
        launches.append(dq_launch(problem, grads, tile))
    return launches


def delta_launch(problem: Problem, grads: Gradients) -> Launch:
    q_len, value_dim = problem.lengths[0], problem.dims[1]
    packed = problem.cu_seqlens is not None
    return Launch(
        kernel=delta_kernel,
        grid=(problem.heads, triton.cdiv(q_len, ROWS_OF_DELTA), problem.samples),
        arguments={
            "o_ptr": problem.output, "do_ptr": problem.grad_output, "lse_ptr": problem.lse, "gate_ptr": problem.gate,
            "sinks_ptr": contiguous(problem.sinks), "cu_q_ptr": contiguous(problem.cu_seqlens[0]) if packed else None,
            "delta_ptr": grads.delta, "dgate_ptr": grads.gate, "dsinks_ptr": grads.sinks,
            **strides("o", "bhm", problem.output, packed), **strides("do", "bhm", problem.grad_output, packed),
            **strides("l", "bh", problem.lse, packed), **strides("g", "bh", problem.gate), "q_len": q_len,
            "tiny": tiny_gate(problem.query.dtype),
        },
        constants={"VALUE_DIM": value_dim, "BLOCK_E": triton.next_power_of_2(value_dim), "BLOCK_M": ROWS_OF_DELTA},
        warps=4, stages=1,
    )  # fmt: skip


def dkdv_launch(problem: Problem, grads: Gradients, tile: Tile) -> Launch:
    packed, kv_heads = problem.cu_seqlens is not None, problem.key.shape[1]
    outputs = {
        "dk_ptr": grads.key, "dv_ptr": grads.value,
        "groups_ptr": group_table(problem.kv_of_query, kv_heads, problem.query.device),
        **strides("dk", "bhn", grads.key, packed), **strides("dv", "bhn", grads.value, packed),
    }  # fmt: skip
    grid = (triton.cdiv(problem.lengths[1], tile.block_n), problem.samples, kv_heads)
    arguments = recompute_arguments(problem, grads) | outputs
    return Launch(dkdv_kernel, grid, arguments, recompute_constants(problem, tile), tile.warps, tile.stages)


def dq_launch(problem: Problem, grads: Gradients, tile: Tile) -> Launch:
    outputs = {
        "dq_ptr": grads.query, "dbias_ptr": grads.bias,
        "kv_of_query_ptr": head_table(problem.kv_of_query, problem.query.device),
        **strides("dq", "bhm", grads.query, problem.cu_seqlens is not None),
    }  # fmt: skip
    grid = (problem.heads, triton.cdiv(problem.lengths[0], tile.block_m), problem.samples)
    arguments = recompute_arguments(problem, grads) | outputs
    return Launch(dq_kernel, grid, arguments, recompute_constants(problem, tile), tile.warps, tile.stages)


def closed_gate_launch(problem: Problem, grads: Gradients, tile: Tile) -> Launch:
    blocks = triton.cdiv(problem.lengths[0], ROWS_OF_DELTA)
    known = recompute_arguments(problem, grads) | {
        "blocks": blocks, "dgate_ptr": grads.gate, "sinks_ptr": contiguous(problem.sinks), "tiny": tiny_gate(problem.query.dtype),
        "kv_of_query_ptr": head_table(problem.kv_of_query, problem.query.device),
    }  # fmt: skip
    constants = recompute_constants(problem, tile)
    arguments = {name: known[name] for name in closed_gate_kernel.arg_names if name not in constants}
    grid = (problem.heads, min(blocks, PROGRAMS), problem.samples)
    return Launch(closed_gate_kernel, grid, arguments, constants, tile.warps, tile.stages)


def recompute_arguments(problem: Problem, grads: Gradients) -> dict:
    """What both kernels that recompute the probabilities take."""
    packed = problem.cu_seqlens is not None
    cu_q, cu_k = problem.cu_seqlens or (None, None)
    (q_len, kv_len), mask, bias = problem.lengths, as_bytes(problem.key_mask), as_bytes(problem.bias)
    if bias is not None:
        bias = bias.expand(problem.samples, problem.heads, q_len, kv_len)
    return {
        "q_ptr": problem.query, "k_ptr": problem.key, "v_ptr": problem.value, "do_ptr": problem.grad_output,
        "lse_ptr": problem.lse, "delta_ptr": grads.delta, "cu_q_ptr": contiguous(cu_q), "cu_k_ptr": contiguous(cu_k),
        "mask_ptr": mask, "gate_ptr": problem.gate, "bias_ptr": bias, "slopes_ptr": contiguous(problem.alibi_slopes),
        **strides("q", "bhm", problem.query, packed), **strides("k", "bhn", problem.key, packed),
        **strides("v", "bhn", problem.value, packed), **strides("do", "bhm", problem.grad_output, packed),
        **strides("l", "bh", problem.lse, packed), **strides("m", "bn", mask), **strides("g", "bh", problem.gate),
        **strides("b", "bhmn", bias), "q_len": q_len, "kv_len": kv_len, "window": near(problem.window),
        "scale": problem.scale * LOG2E, "softcap": problem.softcap * LOG2E, "grad_scale": float(problem.scale),
    }  # fmt: skip


def recompute_constants(problem: Problem, tile: Tile) -> dict:
    bias, (head_dim, value_dim) = problem.bias, problem.dims
    (d_0, d_1), (e_0, e_1) = split_dim(head_dim), split_dim(value_dim)
    return {
        "HEAD_DIM": head_dim, "D_0": d_0, "D_1": d_1, "VALUE_DIM": value_dim, "E_0": e_0, "E_1": e_1, "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n, "CAUSAL": problem.causal, "WINDOW": problem.window > 0, "SOFTCAP": problem.softcap > 0,
        "BIAS": NO_BIAS if bias is None else BOOL_BIAS if bias.dtype == torch.bool else ADDED_BIAS,
        "PRECISE": precise_tanh(problem.query.dtype, problem.softcap),
    }  # fmt: skip


def tiny_gate(dtype: torch.dtype) -> float:
    """Below this size of a gate g, O' = g O has lost O's digits to underflow."""
    return 2.0**-7 if dtype == torch.float16 else 2.0**-60


@cached_table(512)
def group_table(kv_of_query: tuple[int, ...], kv_heads: int, device: torch.device) -> Tensor:
    """int32 [2 * kv_heads + 1]: the kv heads, largest group first, then where each one's query heads start and the last end."""
    sizes = Counter(kv_of_query)
    starts = [0]
    for kv_head in range(kv_heads):
        starts.append(starts[-1] + sizes[kv_head])
    order = sorted(range(kv_heads), key=lambda kv_head: -sizes[kv_head])
    return torch.tensor(order + starts, dtype=torch.int32, device=device)
