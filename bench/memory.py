"""Peak memory of a piece of work."""

from __future__ import annotations

import ctypes
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass
class Peak:
    """megabytes: the largest resident memory of the process inside the block; above: by how much that is above the start."""

    megabytes: float = 0.0
    above: float = 0.0


@contextmanager
def peak_resident() -> Iterator[Peak]:
    """Measures the block. Where the system cannot start the count anew (not Linux) it is the largest since the process began."""
    found = Peak()
    trim()
    reset()
    before = resident("VmRSS")
    yield found
    found.megabytes = resident("VmHWM")
    found.above = max(found.megabytes - before, 0.0)


def trim() -> None:
    """Gives what the C library keeps of freed memory back, so that it counts once it is used again."""
    if sys.platform == "linux":
        try:
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        except OSError:  # another C library
            return


def reset() -> None:
    try:
        CLEAR.write_text("5")
    except OSError:
        return


def resident(field: str) -> float:
    """VmRSS or VmHWM of this process in megabytes."""
    try:
        line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field))
        return int(line.split()[1]) / 1024
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "linux" else 1024**2)
