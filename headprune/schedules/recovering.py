"""Recovery inside a schedule: settings for `hp.recover`, or any function of one's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from headprune.arguments import check_arguments, check_options
from headprune.errors import InvalidInput
from headprune.recovery import Recovery, recover
from headprune.recovery.budget import TrainingBudget
from headprune.recovery.methods import get_method
from headprune.recovery.recover import recover_options, refuse_decided

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Round:
    """One recovery of a schedule: its number and of how many, the dense model, the training data and loss, a seed of its own, a
    folder of its own (None: keep nothing) and where progress goes."""

    number: int
    of: int
    dense: nn.Module
    train: Any
    loss_fn: Callable[[nn.Module, Any], Any] | None
    seed: int
    folder: Path | None
    progress: Progress | None


# What a schedule or RecoverySettings itself gives to `hp.recover`.
GIVEN = {"loss_fn", "teacher", "method", "steps", "minutes", "lr", "seed", "output_dir", "progress"}
Recover = Callable[[nn.Module, Round], Any]


@dataclass(frozen=True)
class RecoverySettings:
    """How `hp.recover` is called after each cut: its arguments of these names. steps or minutes are of each round, and `last` times
    as many of the last one: what is trained before heads go is in part trained in vain (bench/NOTES.md). teacher: distil from the
    dense model. options: further arguments (distil, dropout, patience, bf16, ...)."""

    steps: int | None = None
    minutes: float | None = None
    lr: float | None = None
    method: str = "full"
    teacher: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    last: float = 1.0

    def __post_init__(self) -> None:
        check_arguments(RecoverySettings, vars(self))
        get_method(self.method)
        TrainingBudget.of(self.steps, self.minutes, None, 0.0 if self.lr is None else self.lr, 1)
        if not self.last > 0:
            raise InvalidInput(f"last is {self.last}; expected how many times as much the last round trains, above 0.")
        if self.last != 1 and self.steps is None and self.minutes is None:
            raise InvalidInput(f"last={self.last:g} is so many times the steps or minutes of a round; give one of them too.")
        if self.options:
            refuse_decided(self.options)
            check_options("recovery", self.options, set(recover_options()) - GIVEN)

    def __call__(self, model: nn.Module, round: Round) -> Recovery:
        """Raises HeadpruneError where the loss became NaN: a schedule does not go on from there."""
        times = self.last if round.number == round.of else 1.0
        found = recover(
            model,
            round.train,
            loss_fn=round.loss_fn,
            teacher=round.dense if self.teacher else None,
            method=self.method,
            steps=None if self.steps is None else max(1, int(self.steps * times + 0.5)),
            minutes=None if self.minutes is None else self.minutes * times,
            lr=self.lr,
            seed=round.seed,
            output_dir=round.folder,
            progress=round.progress,
            **self.options,
        )
        found.refuse_diverged(self.lr)
        return found
