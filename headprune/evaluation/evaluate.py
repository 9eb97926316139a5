"""Quality and cost of a model, alone or beside its dense original in the same run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table
from torch import nn

from headprune.evaluation.cost import attention_flops, count_parameters, kv_cache_bytes_per_token
from headprune.evaluation.latency import measure_latency
from headprune.evaluation.memory import peak_activation_bytes
from headprune.evaluation.tasks.task import Task
from headprune.models import attention_sites


@dataclass(frozen=True)
class Evaluation:
    """One model on one task. Latency and peak memory are of one forward pass of the task's latency inputs."""

    quality: dict[str, float]
    parameters: int
    attention_flops: int  # per sequence of `sequence_length`
    sequence_length: int
    kv_cache_bytes_per_token: int
    latency_p50_ms: float
    latency_p95_ms: float
    throughput: float  # sequences per second
    peak_activation_bytes: int


COSTS = {  # field of Evaluation -> its name in tables, the form of its values
    "parameters": ("parameters", "{:,}"),
    "attention_flops": ("attention FLOPs ({tokens} tokens)", "{:.3g}"),
    "kv_cache_bytes_per_token": ("key/value bytes per token", "{:,}"),
    "latency_p50_ms": ("latency p50, ms", "{:.1f}"),
    "latency_p95_ms": ("latency p95, ms", "{:.1f}"),
    "throughput": ("throughput, sequences/s", "{:.1f}"),
    "peak_activation_bytes": ("peak activation bytes", "{:,}"),
}


@dataclass(frozen=True)
class Comparison:
    """Dense and pruned, measured in turn in the same run."""

    task: str
    headline: str
    dense: Evaluation
    pruned: Evaluation
    higher_is_better: bool = True  # of the headline

    def ratio(self, field: str) -> float:
        """Pruned over dense, of a field of Evaluation or a metric; NaN where dense is 0."""
        dense, pruned = (found.quality.get(field, getattr(found, field, None)) for found in (self.dense, self.pruned))
        return pruned / dense if dense else math.nan

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Comparison:
        """Raises KeyError or TypeError where something is missing."""
        return cls(**{**content, "dense": Evaluation(**content["dense"]), "pruned": Evaluation(**content["pruned"])})

    def rows(self) -> list[tuple[str, str, str, str]]:
        """(name, dense, pruned, pruned over dense), as tables show them."""
        rows = []
        for metric in self.dense.quality:
            lower = metric == self.headline and not self.higher_is_better
            values = (f"{found.quality[metric]:.4f}" for found in (self.dense, self.pruned))
            rows.append((f"{metric} (lower is better)" if lower else metric, *values, f"{self.ratio(metric):.3f}"))
        for field, (label, form) in COSTS.items():
            values = (form.format(getattr(found, field)) for found in (self.dense, self.pruned))
            rows.append((label.format(tokens=self.dense.sequence_length), *values, f"{self.ratio(field):.3f}"))
        return rows

    def __rich__(self) -> Table:
        table = Table("", "dense", "pruned", "pruned / dense", title=f"{self.task}, one run", title_justify="left")
        for row in self.rows():
            table.add_row(*row)
        return table


def evaluate(model: nn.Module, task: Task, *, repeats: int = 30, progress: Callable[[int, int], None] | None = None) -> Evaluation:
    """Quality of `model` on `task`'s test data, and what the model costs."""
    return evaluations({"model": model}, task, repeats, progress)["model"]


def compare(
    dense: nn.Module, pruned: nn.Module, task: Task, *, repeats: int = 30, progress: Callable[[int, int], None] | None = None
) -> Comparison:
    """Both models on the same data; latency is measured in turn, dense, pruned, dense, ..."""
    found = evaluations({"dense": dense, "pruned": pruned}, task, repeats, progress)
    return Comparison(task.name, task.headline, found["dense"], found["pruned"], task.higher_is_better)


def evaluations(models: dict[str, nn.Module], task: Task, repeats: int, progress) -> dict[str, Evaluation]:
    inputs = task.latency_inputs()
    length = inputs["input_ids"].shape[1]
    for model in models.values():
        model.eval()
    latency = measure_latency(models, inputs, repeats)
    found = {}
    for name, model in models.items():
        sites = attention_sites(model)
        found[name] = Evaluation(
            quality=task.evaluate(model, progress),
            parameters=count_parameters(model),
            attention_flops=attention_flops(sites, length),
            sequence_length=length,
            kv_cache_bytes_per_token=kv_cache_bytes_per_token(sites, next(model.parameters()).element_size()),
            latency_p50_ms=latency[name].p50_ms,
            latency_p95_ms=latency[name].p95_ms,
            throughput=latency[name].throughput,
            peak_activation_bytes=peak_activation_bytes(model, inputs),
        )
    return found
