"""Differentiable subset pruning: exactly as many open gates as the budget allows at every step (Li, Cotterell, Sachan 2021).

Gumbel noise is added to the logits; the K largest are open, K being what the goal affords. Backwards the gates are those of the
relaxed top K (Xie & Ermon 2019): K softmaxes in a row, each with what the ones before it took away, at a temperature that falls.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from headprune.schedules.gates.gate_method import GateMethod, Moment, gate_method
from headprune.schedules.gates.layout import GateLayout

HOT, COLD = 2.0, 0.3  # temperatures at the start and in the end
RELAXED = 0.9  # the share of the training in which gates are the relaxed ones forwards too


@gate_method
class Subset(GateMethod):
    """Exactly as many open gates as the budget affords, by Gumbel noise on a logit each."""

    name = "subset"

    def __init__(self, layout: GateLayout, norms: Tensor) -> None:
        super().__init__(layout, norms)
        self.logits = nn.Parameter(torch.zeros(len(layout)))

    def drawn(self, moment: Moment) -> Tensor:
        uniform = torch.rand(self.logits.shape, device=self.logits.device).clamp(1e-6, 1 - 1e-6)
        noisy = self.logits - (-uniform.log()).log()
        hard = self.affordable(noisy.detach(), moment.goal)
        if bool(hard.all()):
            return hard + noisy * 0  # all are open; the graph goes through the logits all the same
        soft = relaxed_top(noisy, int(hard.sum()), HOT * (COLD / HOT) ** moment.done)
        return soft if moment.done < RELAXED else hard + soft - soft.detach()

    def still(self, moment: Moment) -> Tensor:
        return self.affordable(self.logits.detach(), moment.goal)

    def importance(self) -> Tensor:
        return self.logits.detach()


def relaxed_top(logits: Tensor, count: int, temperature: float) -> Tensor:
    """[n], sums to `count`; towards temperature 0 the indicator of the `count` largest."""
    taken, left = torch.zeros_like(logits), logits
    for _ in range(count):
        scaled = left / temperature
        share = scaled.softmax(dim=0)
        taken = taken + share
        left = left + log_rest(scaled, share)
    return taken


def log_rest(logits: Tensor, share: Tensor) -> Tensor:
    """log(1 - share) of the softmax of `logits`; of the largest from the others' sum, as 1 - share is 0 where it is nearly all:
    it would be taken once more."""
    largest = torch.arange(len(logits), device=logits.device) == logits.argmax()
    rest = logits.masked_fill(largest, -torch.inf).logsumexp(dim=0) - logits.logsumexp(dim=0)
    return torch.where(largest, rest, torch.log1p(-share.masked_fill(largest, 0.0)))
