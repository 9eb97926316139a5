"""Peak memory of this process while it works."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

PROCESS = Path("/proc/self")


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
