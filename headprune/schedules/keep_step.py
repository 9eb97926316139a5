"""A callback of the trainer that hands over the weights at one step. In a file of its own: the trainer takes a second to import."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import TrainerCallback


class KeepStep(TrainerCallback):
    """Hands the model to `keep` when training has done `step` steps."""

    def __init__(self, step: int, keep: Callable[[nn.Module], None]) -> None:
        self.step, self.keep = step, keep

    def on_step_end(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **_: Any) -> None:
        if state.global_step == self.step and model is not None:
            self.keep(model)
