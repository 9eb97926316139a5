"""A metric with the examples that it is of, so that two models can be compared example by example."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from headprune.errors import InvalidInput
from headprune.scoring.agreement import mean_ranks

Statistic = Callable[[Tensor], float]


@dataclass(frozen=True)
class Metric:
    """rows [examples, columns], fp64, on the CPU: what each example adds; statistic: rows -> the metric.

    Raises InvalidInput where there are no rows.
    """

    rows: Tensor
    statistic: Statistic

    def __post_init__(self) -> None:
        rows = torch.as_tensor(self.rows).detach().double().cpu()
        object.__setattr__(self, "rows", rows[:, None] if rows.dim() == 1 else rows)
        if not len(self.rows):
            raise InvalidInput("a metric needs at least one example; the evaluation data is empty.")

    @property
    def value(self) -> float:
        return self.statistic(self.rows)


def ranked_first(logits: Tensor) -> Tensor:
    """The class [...] with the highest of logits [..., classes]; -1, which is no class, where one of them is NaN."""
    highest, found = logits.max(dim=-1)
    return found.masked_fill(highest.isnan(), -1)


def mean(rows: Tensor) -> float:
    """Of the only column: accuracy, reciprocal rank, squared error, ..."""
    return float(rows[:, 0].mean())


def perplexity(rows: Tensor) -> float:
    """exp of the mean over tokens; columns: summed negative log-likelihood, number of tokens."""
    return float((rows[:, 0].sum() / rows[:, 1].sum()).exp())


def pearson(rows: Tensor) -> float:
    """Correlation of two columns; NaN where one is constant."""
    centred = rows - rows.mean(dim=0)
    scale = centred.norm(dim=0).prod()
    return float(centred.prod(dim=1).sum() / scale) if scale > 0 else float("nan")


def spearman(rows: Tensor) -> float:
    """Rank correlation of two columns (Spearman 1904)."""
    return pearson(torch.stack([mean_ranks(rows[:, 0]), mean_ranks(rows[:, 1])], dim=1))


def macro_f1(rows: Tensor) -> float:
    """Mean over classes of 2 TP / (2 TP + FP + FN); columns: predicted and true class. Classes are those that occur in either."""
    predicted, true = rows[:, 0].long(), rows[:, 1].long()
    classes = torch.cat([predicted, true]).unique()[:, None]
    is_predicted, is_true = predicted == classes, true == classes
    found = 2.0 * (is_predicted & is_true).sum(dim=1) / (is_predicted.sum(dim=1) + is_true.sum(dim=1))
    return float(found.mean())


def matthews(rows: Tensor) -> float:
    """Matthews correlation of predicted and true class for any number of classes (Gorodkin 2004); 0 where one is constant."""
    classes = rows.unique()[:, None]
    predicted, true = ((rows[:, column] == classes).double() for column in (0, 1))

    def covariance(a: Tensor, b: Tensor) -> float:
        return float(((a - a.mean(dim=1, keepdim=True)) * b).sum())

    scale = math.sqrt(covariance(predicted, predicted) * covariance(true, true))
    return covariance(predicted, true) / scale if scale > 0 else 0.0
