"""Peak memory of one forward pass, or of anything else."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn


@torch.inference_mode()
def peak_activation_bytes(model: nn.Module, inputs: Mapping[str, Tensor]) -> int:
    """Largest number of bytes of tensors alive at once in `model(**inputs)`, above what was alive before it: from the CUDA
    allocator's peak, on the CPU from the profiler's record of every allocation."""
    device = next(model.parameters()).device
    placed = {key: value.to(device) for key, value in inputs.items()}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        model(**placed)
        return torch.cuda.max_memory_allocated(device) - before
    return peak_cpu_bytes(lambda: model(**placed))


def peak_cpu_bytes(run: Callable[[], object]) -> int:
    """Largest number of bytes of CPU tensors alive at once during `run()`, of those that it makes itself."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak
