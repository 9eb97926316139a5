"""Hard-concrete gates under an L0 constraint (Louizos, Welling, Kingma 2018; on heads: Voita et al. 2019).

u ~ U(0, 1), s = sigmoid((log u - log(1 - u) + log_alpha) / beta), z = min(1, max(0, s (zeta - gamma) + gamma)); a gate is open with
probability sigmoid(log_alpha - beta log(-gamma / zeta)). The constraint is a Lagrangian (Wang, Wohlwend, Lei 2020; Xia, Zhong,
Chen 2022): lambda_1 gap + lambda_2 gap^2 with gap = expected open cost - goal, and ascent on both lambdas.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from headprune.schedules.gates.gate_method import GateMethod, Moment, gate_method
from headprune.schedules.gates.layout import GateLayout

BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1
START = 2.5  # log alpha: a gate is open with probability 0.98
ASCENT = 1.0  # of lambda_1 per step and unit of gap; lambdas count in usual gate gradients
SQUARE = 10.0  # where lambda_2 starts
LARGEST = 50.0


@gate_method
class HardConcrete(GateMethod):
    """L0: gates that are exactly 0 or 1 with a probability of their own, held to the budget by a Lagrangian."""

    name = "hard_concrete"
    multipliers: Tensor

    def __init__(self, layout: GateLayout, norms: Tensor) -> None:
        super().__init__(layout, norms)
        self.log_alpha = nn.Parameter(torch.full((len(layout),), START))
        self.register_buffer("multipliers", torch.tensor([0.0, SQUARE]))

    def drawn(self, moment: Moment) -> Tensor:
        uniform = torch.rand(self.log_alpha.shape, device=self.log_alpha.device).clamp(1e-6, 1 - 1e-6)
        return stretched(((uniform.logit() + self.log_alpha) / BETA).sigmoid())

    def still(self, moment: Moment) -> Tensor:
        return stretched(self.log_alpha.sigmoid())

    def importance(self) -> Tensor:
        return self.log_alpha.detach()

    def open_probability(self) -> Tensor:
        return torch.where(self.free, open_probability(self.log_alpha), 1.0)

    def gap(self, goal: float) -> Tensor:
        return (self.open_probability() * self.costs).sum() - goal

    def penalty(self, moment: Moment) -> Tensor:
        gap, (linear, square) = self.gap(moment.goal), self.multipliers.unbind()
        return moment.scale * len(self.costs) * (linear * gap + square * gap.square())

    def after_step(self, moment: Moment, gradient: Tensor) -> None:
        gap = self.gap(moment.goal)
        self.multipliers += ASCENT * torch.stack([gap, gap.square()])
        self.multipliers[0].clamp_(-LARGEST, LARGEST)
        self.multipliers[1].clamp_(0.0, LARGEST)

    def open_share(self, moment: Moment) -> float:
        return float(self.gap(0.0).detach())


def stretched(s: Tensor) -> Tensor:
    return (s * (ZETA - GAMMA) + GAMMA).clamp(0.0, 1.0)


def open_probability(log_alpha: Tensor) -> Tensor:
    return (log_alpha - BETA * math.log(-GAMMA / ZETA)).sigmoid()
