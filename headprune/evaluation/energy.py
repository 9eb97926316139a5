"""Energy of forward passes, from the counter of an NVIDIA GPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from headprune.evaluation.data import placed
from headprune.evaluation.latency import synchronize
from headprune.models.placement import device_of

SECONDS = 1.0  # of each model in each round: the counter is renewed some ten times a second
ROUNDS = 3


def energy_counter(device: torch.device) -> Callable[[], float] | None:
    """Reads the joules that the GPU `device` has used since the driver was loaded; None where NVML (nvidia-ml-py) does not say."""
    if device.type != "cuda":
        return None
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")

        def read() -> float:
            return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1e3  # millijoules

        read()
    except Exception:  # not installed, no driver, or a GPU without a counter: NVML has an error of its own for each
        return None
    return read


@torch.inference_mode()
def measure_energy(
    models: Mapping[str, nn.Module], inputs: Mapping[str, Tensor], *, rounds: int = ROUNDS, seconds: float = SECONDS
) -> dict[str, float | None]:
    """Joules of the whole GPU for each sequence of `inputs`, idle power included; the models in turn. None without a counter.

    Other work on the GPU counts too.
    """
    counters = {name: energy_counter(device_of(model)) for name, model in models.items()}
    rows = next(iter(inputs.values())).shape[0]
    joules, sequences = dict.fromkeys(models, 0.0), dict.fromkeys(models, 0)
    for _ in range(rounds):
        for name, model in models.items():
            counter = counters[name]
            if counter is not None:
                used, passes = one_block(model, placed(model, inputs), counter, seconds)
                joules[name] += used
                sequences[name] += passes * rows
    return {name: joules[name] / sequences[name] if sequences[name] else None for name in models}


def one_block(model: nn.Module, inputs: dict[str, Any], counter: Callable[[], float], seconds: float) -> tuple[float, int]:
    """(joules, forward passes) of `seconds` of work."""
    device = device_of(model)
    synchronize(device)
    started, before, passes = time.perf_counter(), counter(), 0
    while passes == 0 or time.perf_counter() - started < seconds:
        model(**inputs)
        synchronize(device)
        passes += 1
    return counter() - before, passes
