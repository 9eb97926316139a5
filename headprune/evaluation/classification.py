"""Classification and regression heads, of text or of images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from headprune.errors import InvalidInput
from headprune.evaluation.data import EvaluationData, Progress, placed
from headprune.evaluation.metric import Metric, macro_f1, matthews, mean, pearson, ranked_first, spearman

LABELS = "labels"


class Labelled(EvaluationData):
    """Batches of `model(**inputs)` with their labels under "labels", which the model does not get.

    The model gives logits [examples, classes], as a tensor (timm) or as `output.logits` (transformers). Costs are measured with the
    first batch. Raises InvalidInput where there are no batches, or one has no labels.
    """

    def __init__(self, batches: Sequence[Mapping[str, Tensor]], *, name: str | None = None) -> None:
        if not batches:
            raise InvalidInput(f"{type(self).__name__} needs at least one batch.")
        missing = next((number for number, batch in enumerate(batches) if LABELS not in batch), None)
        if missing is not None:
            raise InvalidInput(f"batch {missing} has no {LABELS!r}, only {', '.join(batches[missing])}; add them.")
        self.batches = list(batches)
        self.name = name or self.name

    @torch.inference_mode()
    def outputs_and_labels(self, model: nn.Module, progress: Progress | None) -> Iterator[tuple[Tensor, Tensor]]:
        """(logits in fp32, labels) of each batch, on the CPU."""
        for done, batch in enumerate(self.batches, 1):
            inputs = {name: value for name, value in batch.items() if name != LABELS}
            yield logits_of(model(**placed(model, inputs))).float().cpu(), batch[LABELS].cpu()
            if progress:
                progress(done, len(self.batches))

    def latency_inputs(self) -> dict[str, Tensor]:
        return {name: value for name, value in self.batches[0].items() if name != LABELS}


class Classification(Labelled):
    """accuracy (the headline), macro F1 and Matthews correlation; accuracy@k for each further k of `top`."""

    name = "classification"
    headline = "accuracy"
    higher_is_better = True

    def __init__(self, batches: Sequence[Mapping[str, Tensor]], *, top: Sequence[int] = (), name: str | None = None) -> None:
        super().__init__(batches, name=name)
        self.top = tuple(top)

    def examples(self, model: nn.Module, progress: Progress | None = None) -> dict[str, Metric]:
        """Each metric over all labelled examples. Raises InvalidInput for a label that is none of the model's classes."""
        pairs: list[Tensor] = []
        hits: dict[int, list[Tensor]] = {count: [] for count in self.top}
        for logits, labels in self.outputs_and_labels(model, progress):
            classes = logits.shape[-1]
            if labels.min() < 0 or labels.max() >= classes:
                raise InvalidInput(f"labels are {int(labels.min())} to {int(labels.max())}; the model has {classes} classes.")
            told = ranked_first(logits)
            pairs.append(torch.stack([told, labels], dim=-1).double())
            for count, found in hits.items():
                among = (logits.topk(min(count, classes)).indices == labels[:, None]).any(dim=-1)
                found.append((among & (told >= 0)).double())
        both = torch.cat(pairs)
        right = (both[:, 0] == both[:, 1]).double()
        further = {f"accuracy@{count}": Metric(torch.cat(found), mean) for count, found in hits.items()}
        of_classes = {"f1": Metric(both, macro_f1), "matthews": Metric(both, matthews)}
        return {"accuracy": Metric(right, mean), **further, **of_classes}


class ImageClassification(Classification):
    """accuracy and accuracy@5 of images; batches of {"pixel_values": ..., "labels": ...}, or "x" for timm's models."""

    name = "image-classification"

    def __init__(self, batches: Sequence[Mapping[str, Tensor]], *, top: Sequence[int] = (5,), name: str | None = None) -> None:
        super().__init__(batches, top=top, name=name)


class Regression(Labelled):
    """Pearson (the headline) and Spearman correlation, and mean squared error, of a head with one output."""

    name = "regression"
    headline = "pearson"
    higher_is_better = True

    def examples(self, model: nn.Module, progress: Progress | None = None) -> dict[str, Metric]:
        """Each metric over all labelled examples. Raises InvalidInput where the model has several outputs."""
        pairs = []
        for logits, labels in self.outputs_and_labels(model, progress):
            if logits.dim() > 1 and logits.shape[-1] != 1:
                raise InvalidInput(f"regression needs a head with one output; the model has {logits.shape[-1]}.")
            pairs.append(torch.stack([logits.view(-1), labels.view(-1).float()], dim=-1).double())
        both = torch.cat(pairs)
        error = Metric((both[:, 0] - both[:, 1]).square(), mean)
        return {"pearson": Metric(both, pearson), "spearman": Metric(both, spearman), "mse": error}


def logits_of(output: Any) -> Tensor:
    found = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if found is None:
        raise InvalidInput(f"the model gives {type(output).__name__} without logits; evaluate one with a classification head.")
    return found
