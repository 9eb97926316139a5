"""Peak memory: of one forward pass, and of this process while it works."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor, nn

PROCESS = Path("/proc/self")


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
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        model(**placed)
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak


@contextmanager
def process_peak() -> Iterator[Callable[[], tuple[int | None, int | None]]]:
    """Gives a function: the most memory that was resident in this process since the block began, and that its CUDA tensors took on
    the current device; bytes, None where it is not known. On systems other than Linux the first counts from the process's start.
    """
    device = torch.cuda.is_available() and torch.cuda.is_initialized()
    if device:
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):
        (PROCESS / "clear_refs").write_text("5")  # resets the high-water mark
    yield lambda: (resident_peak(), torch.cuda.max_memory_allocated() if device else None)


def resident_peak() -> int | None:
    with suppress(OSError):
        status = (PROCESS / "status").read_text()
        return next((1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")), None)
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
