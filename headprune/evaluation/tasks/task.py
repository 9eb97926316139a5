"""What a task is, and the registry of all of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn

from headprune.errors import InvalidInput, unknown_name

Progress = Callable[[int, int], None]


class Task(ABC):
    """Data and a metric: what heads are scored on, projections are re-solved on, and quality is measured on.

    `calibration` is a list of batches that never overlaps the test data; `tokenizer` is saved with a pruned model.
    """

    name: ClassVar[str]
    headline: ClassVar[str]  # the metric that stands for quality
    higher_is_better: ClassVar[bool]
    calibration: list[Any]
    tokenizer: Any

    @abstractmethod
    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Per-sample losses, differentiable."""

    @abstractmethod
    def forward(self, model: nn.Module, batch: Any) -> Any:
        """Runs the model on a batch, without a loss."""

    @abstractmethod
    def evaluate(self, model: nn.Module, progress: Progress | None = None) -> dict[str, float]:
        """Quality on the test data, by metric."""

    @abstractmethod
    def outputs(self, model: nn.Module) -> Tensor:
        """A small deterministic output, by which two models are compared."""

    @abstractmethod
    def latency_inputs(self) -> dict[str, Tensor]:
        """Real inputs for `model(**inputs)`."""

    def training(self) -> list[Any]:
        """Batches to recover a pruned model on, as those of calibration and never of test data; more of them where there are."""
        return self.calibration

    def check_model(self, model: nn.Module) -> None:
        """Raises InvalidInput where `model` is not of the kind that the task reads."""
        return

    def prompt(self) -> dict[str, Tensor] | None:
        """What `model.generate` takes, for a model that generates; None for others."""
        return None


_tasks: dict[str, type[Task]] = {}


def register_task(task: type[Task]) -> type[Task]:
    """Adds a task under its name."""
    _tasks[task.name] = task
    return task


def check_task(name: str) -> type[Task]:
    if name not in _tasks:
        raise unknown_name("task", name, _tasks)
    return _tasks[name]


def build_task(name: str, tokenizer: Any, **options: Any) -> Task:
    """The task `name` for models that read `tokenizer`'s tokens. Raises InvalidInput for an unknown name or option, for a
    missing tokenizer, and where no calibration data is left."""
    kind = check_task(name)
    if tokenizer is None:
        raise InvalidInput(f"task {name} needs a tokenizer, and the model folder has none.")
    try:
        task = kind(tokenizer, **options)
    except TypeError as error:
        raise InvalidInput(f"options of task {name}: {error}") from None
    if not task.calibration:
        raise InvalidInput(f"the calibration set of task {name} is empty; give more pairs, texts or tokens.")
    return task
