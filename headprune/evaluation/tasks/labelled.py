"""Classification by a head on text or images, labels given as numbers or by the names of the model's classes."""

from __future__ import annotations

import logging
import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headprune.errors import InvalidInput
from headprune.evaluation.classification import LABELS, Classification, logits_of
from headprune.evaluation.data import Progress, placed
from headprune.evaluation.metric import Metric
from headprune.evaluation.positions import position_limit, refuse_longer
from headprune.evaluation.tasks.other_rows import ClassNumber
from headprune.evaluation.tasks.rows import in_batches
from headprune.evaluation.tasks.task import Task
from headprune.models.tokens import IGNORED_LABEL

Example = tuple[Any, str]  # what the model reads (texts, the path of an image), its label as it stands in the data
DEFAULT_NAME = "LABEL_"  # transformers' names of classes that nobody named
NUMBER = re.compile(r"\d+(\.0+)?")  # 1.0: as pandas writes a column of whole numbers in which one is missing
OTHER_KINDS = {"regression": "gives numbers", "multi_label_classification": "tells several at once"}  # `config.problem_type`
log = logging.getLogger("headprune")


class OfClasses(Task):
    """Labels are places in `names` until `settle_all` tells which of a model's classes these are; -100 stays. said: what the data
    call the classes whose numbers they have."""

    names: list[str]
    test: list[dict[str, Tensor]]
    numbers: dict[str, int] | None = None
    said: Mapping[str, str] = MappingProxyType({})

    def label_of(self, value: Any) -> str:
        """As it stands in the data; where these have a name for the number, that is kept."""
        if isinstance(value, ClassNumber) and str(value) not in self.said:
            self.said = {**self.said, str(value): value.name}
        return str(value)

    def settle_all(self, model: nn.Module) -> None:
        """Raises InvalidInput where a label is none of the model's classes, or the numbers are those of another model."""
        numbers = numbers_of(self.names, model, f"task {self.name}", self.said)
        if self.numbers is None:
            tell_guess(numbers, model)
            self.numbers = numbers
            self.settle([*self.calibration, *self.test])
        elif numbers != self.numbers:
            raise InvalidInput(f"task {self.name} was made for a model with other numbers of classes; make it anew for this one.")

    def settle(self, batches: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        own = torch.tensor([self.settled()[name] for name in self.names])
        for batch in batches:
            labels = batch[LABELS]
            batch[LABELS] = torch.where(labels == IGNORED_LABEL, labels, own[labels.clamp(min=0)])
        return batches

    def settled(self) -> dict[str, int]:
        if self.numbers is None:
            raise InvalidInput(f"task {self.name} does not know the model's classes yet; call task.check_model(model) first.")
        return self.numbers


class Labelled(OfClasses):
    """accuracy (the headline), macro F1 and Matthews correlation; the loss is cross entropy.

    Labels are numbers of classes, or names in the model's `config.label2id`; numbers that a data set has names for (ClassLabel) are
    taken by these where the model has them too. Where the model's classes have no names, as many names
    as it has classes are counted in alphabetical order. They are settled by `check_model`.
    """

    headline = "accuracy"
    higher_is_better = True

    def __init__(
        self, tokenizer: Any, calibration: Sequence[Example], test: Sequence[Example], training: Sequence[Example], batch: int
    ) -> None:
        if batch < 1:
            raise InvalidInput(f"batch={batch}; expected at least 1 example a batch.")
        self.tokenizer, self.batch, self.training_examples = tokenizer, batch, list(training)
        self.names = sorted({label for _, label in (*calibration, *test, *training)})
        self.calibration, self.test = self.batches(calibration), self.batches(test)

    @abstractmethod
    def inputs(self, examples: list[Any]) -> Mapping[str, Tensor]:
        """What the model reads of them, for `model(**inputs)`."""

    def batches(self, examples: Sequence[Example]) -> list[dict[str, Tensor]]:
        """Labels are places in `names` until the model tells what these are."""
        places = {name: place for place, name in enumerate(self.names)}
        return [
            {**self.inputs([read for read, _ in some]), LABELS: torch.tensor([places[label] for _, label in some])}
            for some in in_batches(examples, self.batch)
        ]

    def check_model(self, model: nn.Module) -> None:
        if "TokenClassification" in type(model).__name__:
            raise InvalidInput(f"task {self.name}: {type(model).__name__} classifies words; take the task token-classification.")
        self.settle_all(model)
        refuse_longer([*self.calibration, *self.test], position_limit(model), model)

    def training(self) -> list[dict[str, Tensor]]:
        return self.settle(self.batches(self.training_examples))

    def forward(self, model: nn.Module, batch: dict[str, Tensor]) -> Any:
        return model(**placed(model, {name: value for name, value in batch.items() if name != LABELS}))

    def readout(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """[examples, classes], the logits."""
        return logits_of(self.forward(model, batch))

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        self.settled()
        logits = self.readout(model, batch).float()
        return F.cross_entropy(logits, batch[LABELS].to(logits.device), reduction="none")

    def examples(self, model: nn.Module, progress: Progress | None = None) -> dict[str, Metric]:
        self.settled()
        return Classification(self.test).examples(model, progress)

    @torch.inference_mode()
    def outputs(self, model: nn.Module) -> Tensor:
        return self.readout(model, self.test[0]).float()

    def latency_inputs(self) -> dict[str, Tensor]:
        return {name: value for name, value in self.test[0].items() if name != LABELS}


def numbers_of(names: Sequence[str], model: nn.Module, task: str, said: Mapping[str, str] = MappingProxyType({})) -> dict[str, int]:
    """Label as it stands in the data -> number of the model's class. said: names that the data have for numbers, which count where
    the model has all of them too, in whatever letters. InvalidInput where a label is none of its classes."""
    config: Any = getattr(model, "config", None)
    classes, known = getattr(config, "num_labels", None), dict(getattr(config, "label2id", None) or {})
    if not isinstance(classes, int) or "Classification" not in type(model).__name__:
        raise InvalidInput(f"{task} needs a model with a classification head; {type(model).__name__} has none.")
    kind = str(getattr(config, "problem_type", None))
    if classes == 1 or kind in OTHER_KINDS:
        what = OTHER_KINDS.get(kind, "gives one number")
        raise InvalidInput(f"{task} is for models that tell one class of several; this {type(model).__name__} {what}.")
    if all(name in known for name in names):
        return {name: int(known[name]) for name in names}
    lower = {str(name).lower(): int(number) for name, number in known.items()}
    if all(said.get(name, "").lower() in lower for name in names):
        numbers = {name: lower[said[name].lower()] for name in names}
    elif all(NUMBER.fullmatch(name) for name in names):
        numbers = {name: int(float(name)) for name in names}
    elif all(str(name).startswith(DEFAULT_NAME) for name in known):
        numbers = in_order(names, classes, type(model).__name__, task)
    else:
        strange = min((name for name in names if name not in known), key=lambda name: NUMBER.fullmatch(name) is not None)
        raise InvalidInput(f"{task}: the label {strange!r} is none of the model's classes, {', '.join(map(str, known))[:200]}.")
    if max(numbers.values()) >= classes:
        raise InvalidInput(f"{task}: labels go up to {max(numbers.values())}, and the model has {classes} classes, counted from 0.")
    return numbers


def in_order(names: Sequence[str], classes: int, model: str, task: str) -> dict[str, int]:
    """Names in alphabetical order, which is a guess; InvalidInput where they are not as many as the classes."""
    if len(names) != classes:
        raise InvalidInput(
            f"{task}: the data has {len(names)} labels ({', '.join(names)[:200]}), {model} has {classes} classes without names. "
            "Name them in config.label2id, or give numbers."
        )
    return {name: place for place, name in enumerate(names)}


def tell_guess(numbers: Mapping[str, int], model: nn.Module) -> None:
    """A line in the log where labels are numbered by their order alone."""
    known: Any = getattr(getattr(model, "config", None), "label2id", None) or {}
    if not all(name in known or NUMBER.fullmatch(name) for name in numbers):
        shown = ", ".join(f"{name} = {number}" for name, number in numbers.items())
        log.warning("the model's classes have no names; labels are taken in alphabetical order: %s", shown[:200])
