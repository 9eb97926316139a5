"""Gates under L1 or a group lasso, closed to exactly 0 by proximal steps.

minimise L + lambda sum_h w_h |gate_h|: after each step of the optimizer every gate moves towards 0 by rate * lambda * w_h and
stays there if it would pass it. L1: w_h = 1. Group lasso: w_h = ||W_h||_2, the head's columns of the output projection, as
sum_h ||gate_h W_h||_2 is then the group lasso of the projection that the model really has (Wen et al. 2016). lambda rises while
more is open than the goal and falls while less is: dual ascent. It counts in the gates' steps: at 1 a gate closes unless the loss
resists.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from headprune.schedules.gates.gate_method import GateMethod, Moment, gate_method
from headprune.schedules.gates.layout import GateLayout

ASCENT = 0.5  # of lambda per step and unit of the open share that is too much
LARGEST = 1.5


class Proximal(GateMethod):
    strength: Tensor

    def __init__(self, layout: GateLayout, norms: Tensor) -> None:
        super().__init__(layout, norms)
        self.gates = nn.Parameter(torch.ones(len(layout)))
        self.register_buffer("strength", torch.zeros(()))

    def weights(self) -> Tensor:
        """[units]: how strongly each gate is pulled."""
        return torch.ones_like(self.costs)

    def drawn(self, moment: Moment) -> Tensor:
        return self.gates

    def still(self, moment: Moment) -> Tensor:
        return torch.where(self.weights() > 0, self.gates.detach(), 0.0)

    def importance(self) -> Tensor:
        return self.gates.detach().abs() * self.weights()

    def after_step(self, moment: Moment, gradient: Tensor) -> None:
        pulled = moment.rate * self.strength * self.weights()
        self.gates.copy_(self.gates.sign() * (self.gates.abs() - pulled).clamp(min=0.0))
        self.strength += ASCENT * (self.open_share(moment) - moment.goal)
        self.strength.clamp_(0.0, LARGEST)


@gate_method
class L1(Proximal):
    """L1 on the gates: the same pull on every one."""

    name = "l1"


@gate_method
class GroupLasso(Proximal):
    """A group lasso: each gate is pulled by the norm of what it opens."""

    name = "group_lasso"

    def weights(self) -> Tensor:
        return self.norms
