"""The logits of a model's output, and how a student's are compared with its teacher's: by what the model's head is for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.modeling_outputs import SemanticSegmenterOutput

from headprune.errors import InvalidInput
from headprune.recovery.divergence import label_divergence, number_difference, softened_divergence, top_divergence


def logits_of(output: Any) -> Tensor:
    """The logits of a model's output, [..., classes]; of a segmented picture [batch, height, width, classes]."""
    if isinstance(output, SemanticSegmenterOutput) and output.logits is not None:
        return output.logits.movedim(1, -1)
    found = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if found is None and isinstance(output, tuple) and output and isinstance(output[0], Tensor):
        found = output[0]
    if found is None:
        raise InvalidInput(f"{type(output).__name__} has no logits; distil hidden, embedding or relations instead.")
    return found


def problem_type(model: Any) -> str | None:
    """What a transformers model's head is for, where it says so."""
    found: str | None = getattr(getattr(model, "config", None), "problem_type", None)
    return found


Divergence = Callable[[Tensor, Tensor, float], Tensor]
OF_PROBLEM: dict[str | None, Divergence] = {"multi_label_classification": label_divergence, "regression": number_difference}


def divergence_of(logits: Tensor, problem: str | None) -> Divergence:
    """How such logits are compared, (student, teacher, temperature) -> rows."""
    return OF_PROBLEM.get(problem, number_difference if logits.shape[-1] == 1 else softened_divergence)  # one's softmax is 1


def refuse_without_classes(logits: Tensor, problem: str | None) -> None:
    """InvalidInput for logits that the likeliest classes do not tell."""
    if divergence_of(logits, problem) is not softened_divergence:
        raise InvalidInput(
            "the teacher gives numbers or several labels at once, no classes to store the likeliest of; train with teacher=the "
            "model itself."
        )


@dataclass(frozen=True)
class TopLogits:
    """A stored teacher's output: its k likeliest classes, log softmax(logits / temperature) of them, and how many classes
    there are. indices, log_probabilities [..., k]."""

    indices: Tensor
    log_probabilities: Tensor
    classes: int
    temperature: float

    def divergence(self, student: Tensor, temperature: float) -> Tensor:
        if temperature != self.temperature:
            raise InvalidInput(
                f"the stored logits are of temperature {self.temperature}, the distillation's is {temperature}; store them anew."
            )
        if student.shape[:-1] != self.indices.shape[:-1]:
            raise InvalidInput(
                f"the stored logits are of {list(self.indices.shape[:-1])} rows, the student's of {list(student.shape[:-1])}."
            )
        indices, expected = self.indices.to(student.device).long(), self.log_probabilities.to(student.device)
        return top_divergence(student, indices, expected, temperature)
