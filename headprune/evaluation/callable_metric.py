"""Any function of a model as what it is evaluated by."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from headprune.errors import InvalidInput
from headprune.evaluation.data import EvaluationData, Progress
from headprune.evaluation.metric import Metric, mean

Found = float | Tensor | Mapping[str, "float | Tensor"]


class CallableMetric(EvaluationData):
    """function(model) -> a number, a tensor [examples] whose mean is the metric (differences get intervals), or several by name.

    inputs: for `model(**inputs)`, what costs are measured with. The first metric is the headline.
    """

    totals = True

    def __init__(
        self,
        function: Callable[[nn.Module], Found],
        inputs: Mapping[str, Tensor],
        *,
        name: str | None = None,
        higher_is_better: bool = True,
    ) -> None:
        self.function, self.inputs, self.higher_is_better = function, inputs, higher_is_better
        self.name = name or str(getattr(function, "__name__", "metric"))
        self.headline = self.name

    @torch.inference_mode()
    def found(self, model: nn.Module) -> dict[str, Any]:
        found = self.function(model)
        named = dict(found) if isinstance(found, Mapping) else {self.name: found}
        if not named:
            raise InvalidInput(f"the metric {self.name} gave nothing; expected a number, a tensor or a mapping of them.")
        self.headline = next(iter(named))
        return named

    def examples(self, model: nn.Module, progress: Progress | None = None) -> dict[str, Metric]:
        """A number counts as a single example."""
        return {
            name: Metric(torch.as_tensor(value, dtype=torch.float64).reshape(-1), mean) for name, value in self.found(model).items()
        }

    def latency_inputs(self) -> Mapping[str, Tensor]:
        return self.inputs
