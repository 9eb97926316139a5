"""How sure the difference between two models is, given the examples that they were compared on."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from headprune.arguments import check_arguments
from headprune.errors import InvalidInput, whole_number
from headprune.evaluation.metric import Metric

RESAMPLES = 1000


@dataclass(frozen=True)
class Interval:
    """Second minus first of a metric, and where it lies in `level` of the draws of examples."""

    difference: float
    low: float
    high: float
    level: float
    examples: int

    @property
    def settled(self) -> bool:
        """Whether the interval leaves 0 out, so that the examples tell the models apart."""
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        return f"{self.difference:+.4f} [{self.low:+.4f}, {self.high:+.4f}]"


def paired_bootstrap(first: Metric, second: Metric, level: float = 0.95, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """Percentile interval (Efron 1979) of the difference: each draw takes the same examples of both models, with replacement.

    Examples that depend on one another (overlapping windows of one text) make it too narrow. Raises InvalidInput where the metrics
    have different numbers of examples, or the level is not in (0, 1).
    """
    check_arguments(paired_bootstrap, locals())
    whole_number("resamples", resamples)
    count = len(first.rows)
    if count != len(second.rows):
        raise InvalidInput(f"the models were measured on {count} and {len(second.rows)} examples; a pair needs the same ones.")
    if not 0 < level < 1:
        raise InvalidInput(f"level is {level}; expected a share of the draws above 0 and below 1, such as 0.95.")
    generator = torch.Generator().manual_seed(seed)
    differences = torch.empty(resamples, dtype=torch.float64)
    for number in range(resamples):
        drawn = torch.randint(count, (count,), generator=generator)
        differences[number] = second.statistic(second.rows[drawn]) - first.statistic(first.rows[drawn])
    differences = differences[~differences.isnan()]  # draws of one single value have no correlation
    tail = (1 - level) / 2
    quantiles = torch.tensor([tail, 1 - tail], dtype=torch.float64)
    low, high = differences.quantile(quantiles).tolist() if len(differences) else (float("nan"),) * 2
    return Interval(second.value - first.value, low, high, level, count)
