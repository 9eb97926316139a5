"""What a piece of work takes: time on the clock, time of the processor, peak memory."""

from __future__ import annotations

import ctypes
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass
class Spent:
    """seconds on the clock; cpu_seconds of all threads, which other work on the machine does not change much; megabytes: the
    largest resident memory of the process; above: by how much that is more than at the start."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    megabytes: float = 0.0
    above: float = 0.0

    def __add__(self, other: Spent) -> Spent:
        """One after the other."""
        times = (self.seconds + other.seconds, self.cpu_seconds + other.cpu_seconds)
        return Spent(*times, max(self.megabytes, other.megabytes), max(self.above, other.above))


@contextmanager
def spending() -> Iterator[Spent]:
    """Measures the block. Where the system cannot start the count of memory anew (not Linux) it is that of the whole process."""
    found = Spent()
    trim()
    reset()
    before, started, cpu_started = resident("VmRSS"), time.perf_counter(), time.process_time()
    yield found
    found.seconds, found.cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
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
