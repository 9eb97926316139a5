"""What a way of learning gates is, and the registry of all of them."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from headprune.errors import unknown_name
from headprune.schedules.gates.layout import GateLayout


@dataclass(frozen=True)
class Moment:
    """Where the training stands. done: the share of its steps that is over. goal: the share of the cost that is to be open by
    now. rate: the gates' learning rate. scale: the usual size of dL/dgate, by which penalties are measured, so that no setting
    hangs on the scale of the loss."""

    done: float
    goal: float
    rate: float
    scale: float


class GateMethod(nn.Module):
    """Gates [units] of a layout that are trained with the model. Parameters are trained by Adam at the gates' rate."""

    name: ClassVar[str]
    layout: GateLayout
    costs: Tensor
    free: Tensor
    norms: Tensor

    def __init__(self, layout: GateLayout, norms: Tensor) -> None:
        """norms [units]: the mean norm of the output projection's columns in each unit, 1 on average."""
        super().__init__()
        self.layout = layout
        self.register_buffer("costs", layout.costs, persistent=False)
        self.register_buffer("free", layout.free, persistent=False)
        self.register_buffer("norms", norms.float(), persistent=False)

    def forward(self, moment: Moment) -> Tensor:
        """The gates of one training step, differentiable; those that must stay open are 1."""
        return torch.where(self.free, self.drawn(moment), 1.0)

    @torch.no_grad()
    def settled(self, moment: Moment) -> Tensor:
        """The gates [units] that stand when training is over, without noise."""
        return torch.where(self.free, self.still(moment), 1.0)

    @abstractmethod
    def drawn(self, moment: Moment) -> Tensor:
        """[units], differentiable."""

    @abstractmethod
    def still(self, moment: Moment) -> Tensor:
        """[units], without noise."""

    @abstractmethod
    def importance(self) -> Tensor:
        """[units]: the higher, the more a unit should stay."""

    def penalty(self, moment: Moment) -> Tensor | None:
        """What is added to the loss; None for nothing."""
        return None

    def after_step(self, moment: Moment, gradient: Tensor) -> None:
        """Called after each optimizer step, without gradients; gradient [units]: dL/dgate."""
        return

    def open_share(self, moment: Moment) -> float:
        """The share of the cost that is open now (expected, where gates are random)."""
        return float(((self.settled(moment) != 0) * self.costs).sum())

    def affordable(self, ranking: Tensor, goal: float) -> Tensor:
        """[units], 1.0 for the highest of `ranking` whose costs together are at most `goal`, the fixed ones among them."""
        order = torch.where(self.free, ranking, torch.inf).argsort(descending=True, stable=True)
        spent = self.costs[order].cumsum(0)
        chosen = torch.zeros_like(self.costs)
        chosen[order[spent <= goal + 1e-4 / len(self.costs)]] = 1.0
        return chosen


_methods: dict[str, type[GateMethod]] = {}


def gate_method(method: type[GateMethod]) -> type[GateMethod]:
    """Registers a way of learning gates under its name."""
    _methods[method.name] = method
    return method


def get_gate_method(name: str) -> type[GateMethod]:
    if name not in _methods:
        raise unknown_name("gate method", name, _methods)
    return _methods[name]


def gate_methods() -> dict[str, type[GateMethod]]:
    """Every way of learning gates by name."""
    return dict(_methods)
