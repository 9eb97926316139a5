"""The weights and the learning rates that a lottery ticket goes back to."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_model
from torch import Tensor, nn

from headprune.errors import InvalidInput
from headprune.recovery import RateRewind
from headprune.recovery.budget import TrainingBudget
from headprune.recovery.methods import get_method
from headprune.recovery.rewind import Source, rewind_weights
from headprune.schedules.record import stored
from headprune.schedules.recovering import Recover, RecoverySettings


def keeping_step(recover: Recover | None, step: int, keep: Callable[[nn.Module], None]) -> RecoverySettings:
    """`recover`, which also hands over the weights at `step`."""
    from headprune.schedules.keep_step import KeepStep

    settings = check_rewindable(recover, step)
    callbacks = (*settings.options.get("callbacks", ()), KeepStep(step, keep))
    return replace(settings, options={**settings.options, "callbacks": callbacks})


def repeated_from(recover: Recover | None, step: int) -> Recover | None:
    """`recover` without its first `step` steps: the learning rates that followed them (Renda, Frankle, Carbin 2020)."""
    if not step:
        return recover
    settings = check_rewindable(recover, step)
    lr = get_method(settings.method).lr if settings.lr is None else settings.lr
    options = dict(settings.options)
    budget = TrainingBudget.of(settings.steps, None, options.pop("warmup", None), lr, None)
    rates = RateRewind(lambda number: budget.peak * budget.factor(number, 0.0), step, budget.max_steps)
    return replace(settings, steps=None, lr=None, options={**options, "rewind": rates})


def check_rewindable(recover: Recover | None, step: int) -> RecoverySettings:
    """`recover`; InvalidInput where it says no number of steps, or fewer, or that the last round has more."""
    if not isinstance(recover, RecoverySettings) or recover.steps is None or not 0 < step < recover.steps:
        raise InvalidInput(
            f"rewind_step={step} needs recover=RecoverySettings(steps=...) with more steps than that; with a training of your own "
            "give early=, the weights to go back to."
        )
    if recover.last != 1:
        raise InvalidInput(
            f"last={recover.last:g} trains the last round longer, and rewind_step={step} repeats the rates of one training; "
            "leave one of them out."
        )
    return recover


def earlier_model(dense: nn.Module, source: Source) -> nn.Module:
    """A copy of `dense` with the weights of an earlier checkpoint: a module, a folder or a state_dict of it."""
    model = copy.deepcopy(dense)
    rewind_weights(model, source)
    return model


class EarlyWeights:
    """The weights at the step to go back to, in a file of the schedule's folder or in memory."""

    def __init__(self, dense: nn.Module, folder: Path | None) -> None:
        self.dense, self.path = dense, None if folder is None else folder / "early.safetensors"
        self.state: dict[str, Tensor] = {}

    def keep(self, model: nn.Module) -> None:
        if self.path is None:
            self.state = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
        else:
            stored(model, self.path)

    @torch.no_grad()
    def model(self) -> nn.Module:
        found = copy.deepcopy(self.dense)
        if self.path is None:
            found.load_state_dict(self.state)
        else:
            load_model(found, str(self.path))
        return found
