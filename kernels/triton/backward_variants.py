"""What `make aot` compiles of the backward kernels: every head_dim tile, and the options that change the code most."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from headprune.kernels.attention_backward import Gradients, Needs, Problem, backward_launches
from headprune.kernels.launch import AotVariant


def aot_variants(capability: int) -> Iterator[AotVariant]:
    for dim in (64, 128):
        yield from variants(capability, dim, False)
    for dim in (64, 80, 128, 256):
        yield from variants(capability, dim, True)
    yield from variants(capability, 64, True, "everything")
    yield from variants(capability, 64, True, "packed")
    yield from variants(capability, 128, True, dtype=torch.float32)


def variants(
    capability: int, dim: int, causal: bool, option: str = "", dtype: torch.dtype = torch.bfloat16
) -> Iterator[AotVariant]:
    problem, needs = problem_of(dim, causal, option, dtype)
    name = "fp32" if dtype == torch.float32 else "bf16"
    suffix = " ".join([name, f"d{dim}", *["causal"] * causal, *[option] * bool(option)])
    for launch in backward_launches(problem, Gradients.allocate(problem, needs), capability):
        kernel = launch.kernel.__name__.removesuffix("_kernel")
        dots = kernel != "delta" and dtype != torch.float32
        yield AotVariant(f"attention_{kernel} {suffix}", launch, tensor_cores=dots)


def problem_of(dim: int, causal: bool, option: str, dtype: torch.dtype) -> tuple[Problem, Needs]:
    batch, heads, kv_heads, length = 2, 24, 8, 4096

    def empty(*shape: int, of: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, device="meta", dtype=of)

    options, needs = {}, Needs(True, True, True)
    if option == "packed":
        batch, starts = 1, empty(9, of=torch.int32)
        options = {"window": 1024, "cu_seqlens": (starts, starts), "longest": (length, length)}
    if option == "everything":
        options = {
            "window": 1024, "softcap": 50.0, "bias": empty(batch, heads, length, length), "alibi_slopes": empty(heads),
            "sinks": empty(heads), "key_mask": empty(batch, length, of=torch.bool), "gate": empty(batch, heads),
        }  # fmt: skip
        needs = Needs(*[True] * 6)
    query, key, value, output, grad_output = (
        empty(batch, length, count, dim, of=dtype).transpose(1, 2) for count in (heads, kv_heads, kv_heads, heads, heads)
    )  # fmt: skip
    kv_of_query = tuple(min(head // 2, kv_heads - 1) for head in range(heads))
    lse = empty(batch, heads, length)
    return Problem(query, key, value, output, lse, grad_output, kv_of_query, causal, scale=dim**-0.5, **options), needs
