"""What this machine reaches in plain library calls, measured at the start of every benchmark run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import cache

import torch
from versus import Ceilings


@cache
def ceilings(device: str, dtype: torch.dtype) -> Ceilings:
    """The rate of a large matrix product in `dtype`, and the bandwidth of a large copy (GPU) or read (CPU).

    A processor that cannot multiply in `dtype` (bf16 in AVX2: a hundredth of the rate) widens it: the rate is then that of fp32.
    """
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu:
        gflops = product_gflops(device, dtype, 8192)
        source = torch.randn(2**29, device=device, dtype=torch.bfloat16)
        target = torch.empty_like(source)
        return Ceilings(gflops, 2e-9 * source.nbytes / median_seconds(lambda: target.copy_(source), device))
    fastest = max((dtype, torch.float32), key=lambda kind: product_gflops(device, kind, 256))
    gflops = product_gflops(device, fastest, 2048)
    source = torch.randn(2**26)
    return Ceilings(gflops, 1e-9 * source.nbytes / median_seconds(source.sum, device))


def product_gflops(device: str, dtype: torch.dtype, size: int) -> float:
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2e-9 * size**3 / median_seconds(lambda: a @ b, device)


def median_seconds(function: Callable[[], object], device: str, rounds: int = 7) -> float:
    times = []
    for _ in range(rounds + 2):
        start = time.perf_counter()
        function()
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])
