"""Peak memory of a piece of work: the tensors that are alive at once."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from headprune.evaluation.data import placed
from headprune.models.placement import device_of


def peak_bytes(run: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """Largest number of bytes of tensors alive at once in `run()`, above what was alive before it: from the CUDA allocator's
    peak, on the CPU from the profiler's record of every allocation."""
    device = torch.device(device)
    if device.type == "cuda":  # pragma: no cover (needs a CUDA device)
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler writes to stderr otherwise
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak


@torch.inference_mode()
def peak_activation_bytes(model: nn.Module, inputs: Mapping[str, Tensor]) -> int:
    """That of one forward pass, `model(**inputs)`."""
    device = device_of(model)
    on_device = placed(model, inputs)
    return peak_bytes(lambda: model(**on_device), device)
