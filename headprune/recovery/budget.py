"""How long recovery trains, in steps or minutes, and the learning rate along that way."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
import torch.distributed as dist

from headprune.errors import InvalidInput, whole_number
from headprune.settings import described

# Passes over the data where neither steps nor minutes are given. The more of the heads went the more is to be learnt again; with
# fewer passes than three little comes back, however little went (bench/NOTES.md).
PASSES, PASSES_FOR_ALL = 3, 6
UNBOUNDED = 10**9  # steps, where the clock decides


@dataclass(frozen=True)
class TrainingBudget:
    """steps or minutes (evaluation included); warmup: steps of linear warm-up to the rate `lr`, which then falls
    linearly to 0; a function of the step instead of a number is the rate itself."""

    steps: int | None
    minutes: float | None
    warmup: int
    lr: float | Callable[[int], float]

    @classmethod
    def of(
        cls,
        steps: int | None,
        minutes: float | None,
        warmup: int | None,
        lr: float | Callable[[int], float],
        steps_per_pass: int | None,
        gone: float = 0.0,
    ) -> TrainingBudget:
        """gone: the share of the model's heads that went. Raises InvalidInput for a budget that is both or not above 0, for a rate
        below 0."""
        if steps is not None and minutes is not None:
            raise InvalidInput(f"steps={steps} and minutes={minutes}: give one of them.")
        for name, value in (("steps", steps), ("minutes", minutes)):
            if value is not None and not (isinstance(value, Real) and value > 0):
                raise InvalidInput(f"{name} is {value!r}; expected more than 0.")
        if steps is not None:
            steps = whole_number("steps", steps)
        if warmup is not None:
            warmup = whole_number("warmup", warmup, least=0)
        if not callable(lr) and not (isinstance(lr, Real) and lr >= 0 and math.isfinite(lr)):
            raise InvalidInput(f"lr is {lr!r}; expected a learning rate, 0 or more, or a function of the step.")
        if steps is None and minutes is None:
            if steps_per_pass is None:
                raise InvalidInput("the data do not tell how many they are; give steps or minutes.")
            steps = math.ceil(max(PASSES, PASSES_FOR_ALL * gone) * steps_per_pass)
        if warmup is None:
            warmup = 20 if steps is None else min(100, steps // 10)
        return cls(steps, minutes, warmup, lr)

    @property
    def max_steps(self) -> int:
        return UNBOUNDED if self.steps is None else self.steps

    @property
    def peak(self) -> float:
        """What the optimizer is given; `factor` scales it."""
        return 1.0 if callable(self.lr) else self.lr

    def fraction(self, step: int, seconds: float) -> float:
        """How much of the budget is used, 0 to 1."""
        used = step / self.steps if self.steps is not None else seconds / (60 * (self.minutes or math.inf))
        return min(used, 1.0)

    def factor(self, step: int, seconds: float) -> float:
        """The learning rate of step number `step` (from 0), over `peak`."""
        if callable(self.lr):
            return self.lr(step)
        return min(1.0, (step + 1) / (self.warmup + 1)) * (1 - self.fraction(step, seconds))

    def to_json(self) -> dict[str, Any]:
        return {"steps": self.steps, "minutes": self.minutes, "warmup": self.warmup, "lr": described(self.lr)}


class TrainingClock:
    """Seconds of training, those of earlier tries included; the same on every rank, so that all stop at the same step."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self.now, self.earlier = now, 0.0
        self.started = now()

    def seconds(self) -> float:
        """Of this rank."""
        return self.earlier + self.now() - self.started

    def agreed(self) -> float:
        """Of rank 0, told to all."""
        return of_first_rank(self.seconds())


def of_first_rank(value: float) -> float:
    """Rank 0's value, so that all ranks decide alike."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return value
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    found = torch.tensor([value], dtype=torch.float64, device=device)
    dist.broadcast(found, 0)
    return float(found)
