"""Movement scores with gates (Sanh, Wolf, Rush 2020, the hard form; by blocks: Lagunas et al. 2021).

S_h = -sum over steps of dL/dgate_h, and dL/dgate_h = sum of W_h * dL/dW_h over the head's columns of the output projection. The
highest S are open, as many as the goal affords; closed heads get their gradient straight through and may come back.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headprune.schedules.gates.gate_method import GateMethod, Moment, gate_method
from headprune.schedules.gates.layout import GateLayout


@gate_method
class Movement(GateMethod):
    """Movement pruning: open are the heads whose weights move away from 0."""

    name = "movement"
    movement: Tensor

    def __init__(self, layout: GateLayout, norms: Tensor) -> None:
        super().__init__(layout, norms)
        self.register_buffer("movement", torch.zeros(len(layout)))

    def drawn(self, moment: Moment) -> Tensor:
        return self.still(moment).requires_grad_()

    def still(self, moment: Moment) -> Tensor:
        return self.affordable(self.movement, moment.goal)

    def importance(self) -> Tensor:
        return self.movement

    def after_step(self, moment: Moment, gradient: Tensor) -> None:
        self.movement -= gradient / max(moment.scale, 1e-30)
