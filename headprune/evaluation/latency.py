"""Wall-clock time of forward passes, several models in turn in one run."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Latency:
    """Median and 95th percentile of one forward pass in milliseconds; samples per second at the median."""

    p50_ms: float
    p95_ms: float
    throughput: float


@torch.inference_mode()
def measure_latency(
    models: Mapping[str, nn.Module], inputs: Mapping[str, Tensor], repeats: int = 30, warmup: int = 3
) -> dict[str, Latency]:
    """Times `model(**inputs)` for every model, A B A B ..., so that a drifting machine is the same for all."""
    times: dict[str, list[float]] = {name: [] for name in models}
    rows = next(iter(inputs.values())).shape[0]
    for turn in range(warmup + repeats):
        for name, model in models.items():
            device = next(model.parameters()).device
            placed = {key: value.to(device) for key, value in inputs.items()}
            synchronize(device)
            started = time.perf_counter()
            model(**placed)
            synchronize(device)
            if turn >= warmup:
                times[name].append(1e3 * (time.perf_counter() - started))
    found = {}
    for name, values in times.items():
        p50, p95 = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.5, 0.95], dtype=torch.float64)).tolist()
        found[name] = Latency(p50, p95, 1e3 * rows / p50)
    return found


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
