"""I-BERT without heads: its modules hand on the scale of what they return, which is None until it computes in integers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from headprune.models.behaviour import Behaviour
from headprune.models.emptied import Emptied

STEP = 2.0**-7  # of a weight, by which the bias of a layer without weights is rounded


class EmptiedIBert(Emptied):
    """Returns what is asked for, and a scale of each."""

    def result(self, output: Tensor, weights: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        scale = args[1] if len(args) > 1 else kwargs.get("hidden_states_scaling_factor")
        asked = kwargs.get("output_attentions", args[3] if len(args) > 3 else False)
        return ((output, weights), (scale, scale)) if asked else ((output,), (scale,))


class EmptiedQuantLinear(Behaviour):
    """A layer of I-BERT without weights, whose largest it would look for."""

    bias: Tensor
    bias_bit: int
    out_features: int
    quant_mode: bool
    weight_function: Callable[..., Tensor]

    def forward(self, x: Tensor, prev_act_scaling_factor: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        if prev_act_scaling_factor is None or not self.quant_mode:
            plain: tuple[Tensor, None] = super().forward(x)
            return plain
        scale = torch.full_like(self.bias, STEP) * prev_act_scaling_factor
        rounded = self.weight_function(self.bias, self.bias_bit, False, scale)
        return (rounded * scale).expand(*x.shape[:-1], self.out_features), scale
