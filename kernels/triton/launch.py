"""A kernel launch as a value: run it, or compile it ahead of time without a GPU.

A launcher builds a `Launch` from its tensors. Given tensors on the "meta" device (no memory) the same launcher describes what
`make aot` compiles, with exactly the types and specialisations that a real call would have.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from headprune.kernels.cached_table import cached_table

_POINTERS = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float64: "*fp64",
    torch.int32: "*i32", torch.int64: "*i64", torch.uint8: "*u8", torch.int8: "*i8",
}  # fmt: skip


@dataclass(frozen=True)
class Launch:
    """`arguments` are the run-time ones (tensors, tensor descriptors, ints, floats), `constants` the tl.constexpr ones, both by
    name."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    constants: dict[str, Any]
    warps: int
    stages: int

    def run(self) -> None:
        device = next(value.device for value in self.arguments.values() if isinstance(value, Tensor))
        # Triton launches on the current device, wherever the tensors are.
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            self.kernel[self.grid](**self.arguments, **self.constants, num_warps=self.warps, num_stages=self.stages)


@dataclass(frozen=True)
class AotVariant:
    """One line of `make aot`. Each kernel module yields its own from `aot_variants(capability)` (80, 90 or 100)."""

    label: str
    launch: Launch
    tensor_cores: bool = True


def compile_ahead(launch: Launch, capability: int):
    """The compiled kernel (`.asm`, `.metadata`) for sm_<capability>."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    kernel, names = launch.kernel, launch.kernel.arg_names
    signature, constants, attributes = {}, {}, {}
    for position, name in enumerate(names):
        if name in launch.constants:
            signature[name], constants[(position,)] = "constexpr", launch.constants[name]
            continue
        value, plain = launch.arguments[name], kernel.params[position].do_not_specialize
        if value is None or (type(value) is int and value == 1 and not plain):
            signature[name], constants[(position,)] = "constexpr", value
            continue
        signature[name] = argument_type(value)
        if isinstance(value, Tensor) or (type(value) is int and value % 16 == 0 and not plain):
            attributes[(position,)] = [["tt.divisibility", 16]]
    source = (GluonASTSource if kernel.is_gluon() else ASTSource)(kernel, signature, constants, attributes)
    options = {"num_warps": launch.warps, "num_stages": launch.stages}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def argument_type(value: Tensor | int | float | Any) -> str:
    if isinstance(value, Tensor):
        return _POINTERS[value.dtype]
    if hasattr(value, "block_shape"):  # Gluon's tensor descriptor
        return f"tensordesc<{_POINTERS[value.base.dtype][1:]}{list(value.block_shape)},{value.layout!r}>"
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def near(window: int) -> int:
    """`window`, small enough that kernels may add any position to it in 32 bits: no key lies further away."""
    return min(window, 1 << 30)


def as_bytes(tensor: Tensor | None) -> Tensor | None:
    """A bool tensor as uint8, without a copy (Triton gives bool pointers a type of their own); anything else as it is."""
    return tensor.view(torch.uint8) if tensor is not None and tensor.dtype == torch.bool else tensor


@lru_cache(maxsize=64)
def capability_of(device: torch.device) -> int:
    """80, 86, 90, 100, ... of a CUDA device; 0 of any other (Triton's interpreter)."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@cached_table(512)
def head_table(kv_of_query: tuple[int, ...], device: torch.device) -> Tensor:
    """The head map on the device, int32 [query_heads]."""
    return torch.tensor(kv_of_query, dtype=torch.int32, device=device)
