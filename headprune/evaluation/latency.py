"""Wall-clock time of forward passes, several models in turn in one run."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from headprune.evaluation.data import placed
from headprune.evaluation.positions import position_limit
from headprune.models.placement import device_of
from headprune.models.site import Foreign
from headprune.models.tokens import decoder_of


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
            device = device_of(model)
            on_device = placed(model, inputs)
            synchronize(device)
            started = time.perf_counter()
            model(**on_device)
            synchronize(device)
            if turn >= warmup:
                times[name].append(1e3 * (time.perf_counter() - started))
    found = {}
    for name, values in times.items():
        p50, p95 = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.5, 0.95], dtype=torch.float64)).tolist()
        found[name] = Latency(p50, p95, 1e3 * rows / p50)
    return found


@torch.inference_mode()
def measure_generation(
    models: Mapping[str, nn.Module], prompt: Mapping[str, Tensor], new_tokens: int = 16, repeats: int = 5
) -> dict[str, float]:
    """Milliseconds for each of `new_tokens` steps of greedy generation with a cache, reading the prompt included; medians, the
    models in turn, after one turn to warm up. Where a model has positions for less, the prompt is cut, and half of them is for new
    tokens at the most."""
    times: dict[str, list[float]] = {name: [] for name in models}
    limits = [position_limit(model) for model in models.values() if decoder_of(model) is None]
    most = min((limit for limit in limits if limit is not None), default=None)
    if most is not None:
        new_tokens = min(new_tokens, max(1, most // 2))
        prompt = {name: value[:, : most - new_tokens] for name, value in prompt.items()}
    for turn in range(1 + repeats):
        for name, model in models.items():
            device, on_device = device_of(model), placed(model, prompt)
            synchronize(device)
            started = time.perf_counter()
            generating: Foreign = model
            generating.generate(**on_device, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, pad_token_id=0)
            synchronize(device)
            if turn:
                times[name].append(1e3 * (time.perf_counter() - started) / new_tokens)
    return {name: float(torch.tensor(values, dtype=torch.float64).median()) for name, values in times.items()}


def synchronize(device: torch.device) -> None:
    """Waits for what runs on a GPU of any maker (cuda, mps, xpu): else the time is that of asking for it."""
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is not None and device.type == accelerator.type:
        torch.accelerator.synchronize(device)
