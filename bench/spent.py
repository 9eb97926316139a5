"""What a piece of work takes: time on the clock, time of the processor, peak memory."""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from headprune.evaluation.process_memory import process_peak


@dataclass
class Spent:
    """seconds on the clock; cpu_seconds of all threads, which other work on the machine does not change much; megabytes: the
    largest resident memory of the process, with the models and data that it holds."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    megabytes: float = 0.0

    def __add__(self, other: Spent) -> Spent:
        """One after the other."""
        times = (self.seconds + other.seconds, self.cpu_seconds + other.cpu_seconds)
        return Spent(*times, max(self.megabytes, other.megabytes))


@contextmanager
def spending() -> Iterator[Spent]:
    """Measures the block."""
    found = Spent()
    trim()
    with process_peak() as peak:
        started, cpu_started = time.perf_counter(), time.process_time()
        yield found
        found.seconds, found.cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
        found.megabytes = (peak()[0] or 0) / 1e6


def trim() -> None:
    """Gives what the C library keeps of freed memory back, so that it counts once it is used again."""
    if sys.platform == "linux":
        try:
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        except OSError:  # another C library
            return
