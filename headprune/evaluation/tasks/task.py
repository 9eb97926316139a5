"""What a task is, and the registry of all of them."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Callable, Mapping
from inspect import Parameter, signature
from typing import Any, ClassVar, Literal

import yaml
from torch import Tensor, nn
from transformers import FeatureExtractionMixin, PreTrainedTokenizerBase
from transformers.image_processing_base import ImageProcessingMixin

from headprune.arguments import check_arguments
from headprune.errors import InvalidInput, unknown_name
from headprune.evaluation.data import EvaluationData


class Task(EvaluationData):
    """Data and a metric: what heads are scored on, projections are re-solved on, and quality is measured on.

    As `EvaluationData`, with data of its own for all that comes before: `calibration` is a list of batches that never overlaps the
    test data; `tokenizer` is saved with a pruned model.
    """

    reads: ClassVar[Literal["text", "images"]] = "text"
    calibration: list[Any]
    tokenizer: Any

    @classmethod
    def check_options(cls, model: nn.Module, options: Mapping[str, Any]) -> None:
        """Raises InvalidInput where a task with `options` is not for `model`, as far as that is known before the data are read."""
        return

    @property
    def calibration_examples(self) -> int | None:
        """Rows of the calibration batches; None where these are no tensors by name."""
        batches = [batch for batch in self.calibration if isinstance(batch, Mapping)]
        return sum(len(next(iter(batch.values()))) for batch in batches) or None

    @abstractmethod
    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Per-sample losses, differentiable."""

    @abstractmethod
    def forward(self, model: nn.Module, batch: Any) -> Any:
        """Runs the model on a batch, without a loss."""

    def readout(self, model: nn.Module, batch: Any) -> Any:
        """As `forward`, but gives what the metric reads of it, by which a search compares models; by default all that it gives."""
        return self.forward(model, batch)

    @abstractmethod
    def outputs(self, model: nn.Module) -> Tensor:
        """A small deterministic output, by which two models are compared."""

    def training(self) -> list[Any]:
        """Batches to recover a pruned model on, as those of calibration and never of test data; more of them where there are."""
        return self.calibration

    def training_beyond(self, limit: int | None, most: int) -> list[Any]:
        """The training batches where their texts, of up to `most` tokens, may be longer than a model's `limit`; else none need be
        made to know that they fit."""
        return self.training() if limit is not None and most > limit else []

    def token_kinds(self) -> Any:
        """What tells special tokens and punctuation apart, for portraits; None where the model reads no tokens."""
        return self.tokenizer


COMMA = re.compile(r',(?=(?:[^"]*"[^"]*")*[^"]*$)')  # outside of double quotes
_tasks: dict[str, type[Task]] = {}


def register_task(task: type[Task]) -> type[Task]:
    """Adds a task under its name."""
    _tasks[task.name] = task
    return task


def tasks() -> dict[str, type[Task]]:
    """Every task by name."""
    return dict(_tasks)


def check_task(name: str) -> type[Task]:
    if name not in _tasks:
        raise unknown_name("task", name, _tasks)
    return _tasks[name]


def check_task_options(name: str, options: Mapping[str, Any]) -> type[Task]:
    """The task `name`. Raises InvalidInput where there is none, where it takes no such options, or needs others too."""
    kind = check_task(name)
    try:
        signature(kind).bind(None, **options)
    except TypeError as error:
        raise InvalidInput(f"options of task {name}: {error}; it takes {', '.join(task_options(kind))}.") from None
    return kind


def task_options(task: type[Task]) -> list[str]:
    """The names of its options, as recipes and the command line give them."""
    return list(signature(task).parameters)[1:]


def task_defaults(task: type[Task]) -> dict[str, Any]:
    """Option -> what counts where it is not given, of those for which that is not nothing."""
    found = {name: parameter.default for name, parameter in signature(task).parameters.items()}
    return {name: default for name, default in found.items() if default not in (Parameter.empty, None, "")}


def named_task(text: str) -> tuple[str, dict[str, Any]]:
    """(name, options) of a task as the command line names it: NAME, or NAME,option=value,... with YAML values, in double
    quotes where there is a comma in one. Raises InvalidInput for an unknown name, what is no option and an open quote."""
    if text.count('"') % 2:
        raise InvalidInput(f"task {text!r}: a double quote is open; a value with a comma stands between two.")
    name, *rest = COMMA.split(text)
    check_task(name)
    options: dict[str, Any] = {}
    for part in rest:
        key, equals, value = part.partition("=")
        if not equals or not key:
            raise InvalidInput(
                f"task {text!r}: {part!r} is no option; expected {name},option=value, as in calibration=train.txt, and double "
                "quotes around a value with a comma."
            )
        if key.strip() in options:
            raise InvalidInput(f"task {text!r}: {key.strip()} is given twice; leave one of them out.")
        try:
            found = yaml.safe_load(value)
        except yaml.YAMLError:
            raise InvalidInput(f"task {text!r}: {value!r} is not a YAML value.") from None
        options[key.strip()] = value if isinstance(found, dict) else found  # "summarize: " is text
    return name, options


def build_task(name: str, tokenizer: Any, **options: Any) -> Task:
    """The task `name` for models that read what `tokenizer` (of images: the image processor) makes. Raises InvalidInput for an
    unknown name or option, for a missing tokenizer or one of another kind, and where no calibration data is left."""
    kind = check_task_options(name, options)
    refuse_other_tokenizer(f"task {name}", kind.reads, tokenizer)
    check_arguments(kind.__init__, options)
    build: Callable[..., Task] = kind
    task = build(tokenizer, **options)
    if not task.calibration:
        raise InvalidInput(f"the calibration set of task {name} is empty; give more pairs, texts or tokens.")
    return task


def refuse_other_tokenizer(task: str, reads: str, tokenizer: Any) -> None:
    """InvalidInput where `tokenizer`, which came with a model, is missing or is not for what `task` reads ("text", "images")."""
    needed = {"text": "a tokenizer", "images": "an image processor"}[reads]
    if tokenizer is None:
        raise InvalidInput(f"{task} needs {needed}, and the model folder has none; save one there.")
    others = {"text": (ImageProcessingMixin, FeatureExtractionMixin), "images": (PreTrainedTokenizerBase, FeatureExtractionMixin)}
    if isinstance(tokenizer, others[reads]):
        name = type(tokenizer).__name__
        raise InvalidInput(f"{task} is for models of {reads} and needs {needed}; this model came with a {name}.")
