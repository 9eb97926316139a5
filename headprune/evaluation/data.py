"""What a model is evaluated on: test data with a metric, and inputs that its cost is measured with."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from headprune.evaluation.metric import Metric
from headprune.models.placement import device_of

Progress = Callable[[int, int], None]


class EvaluationData(ABC):
    """Give `examples` where the metrics are of single examples (differences then get intervals), else `evaluate`."""

    name: str
    headline: str  # the metric that stands for quality
    higher_is_better: bool
    more: ClassVar[str] = "more test data"  # what is to be given where the test examples are too few
    totals: ClassVar[bool] = False  # whether a metric with one row is a total over examples that nobody tells
    base: ClassVar[bool] = False  # whether it reads the states of the base model: a language model goes without its head

    def examples(self, model: nn.Module, progress: Progress | None = None) -> dict[str, Metric] | None:
        """Each metric with its examples, the same ones in the same order for every model; None where there are only totals."""
        return None

    def evaluate(self, model: nn.Module, progress: Progress | None = None) -> dict[str, float]:
        """Quality on the test data, by metric."""
        found = self.examples(model, progress)
        if found is None:
            raise NotImplementedError(f"{type(self).__name__} gives neither examples nor evaluate")
        return {name: metric.value for name, metric in found.items()}

    @property
    def calibration_examples(self) -> int | None:
        """How many there are to score heads on and re-solve projections on; None for data that is for evaluation alone."""
        return None

    def check_model(self, model: nn.Module) -> None:
        """Raises InvalidInput where `model` is not of the kind that this data is for."""
        return

    @abstractmethod
    def latency_inputs(self) -> Mapping[str, Tensor]:
        """Real inputs for `model(**inputs)`."""

    def prompt(self) -> dict[str, Tensor] | None:
        """What `model.generate` takes, for a model that generates; None for others."""
        return None


def placed(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """`inputs` with their tensors on the model's device."""
    device = device_of(model)
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
