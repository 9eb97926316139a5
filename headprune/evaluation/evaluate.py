"""Quality and cost of a model, alone or beside its dense original in the same run."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any
from weakref import WeakValueDictionary

from rich.table import Table
from torch import Tensor, nn

from headprune.arguments import check_arguments
from headprune.errors import InvalidInput, whole_number
from headprune.evaluation.bootstrap import Interval, paired_bootstrap
from headprune.evaluation.callable_metric import CallableMetric
from headprune.evaluation.cost import attention_flops, cached_bytes_per_token, model_flops, rows_of, sequence_length, weight_bytes
from headprune.evaluation.data import EvaluationData, Progress, placed
from headprune.evaluation.energy import measure_energy
from headprune.evaluation.latency import measure_generation, measure_latency
from headprune.evaluation.machine import machine_name
from headprune.evaluation.memory import peak_activation_bytes
from headprune.evaluation.metric import Metric
from headprune.evaluation.token_counts import count_tokens_of_sites
from headprune.models import attention_sites
from headprune.models.placement import device_of
from headprune.nn.replace import own_attention
from headprune.scoring.passes import in_eval_mode
from headprune.surgery.savings import count_parameters


@dataclass(frozen=True)
class Evaluation:
    """One model on one set of data. Latency, peak memory and energy are of forward passes of the data's latency inputs.

    quality: metric -> value. attention_flops, model_flops: of one sequence of the latency inputs, each attention with the tokens
    that it runs there (`sequence_length` in the first; a decoder has its own, and reads those of the encoder too); the latter of
    all matrix products and convolutions. throughput: sequences a second. weight_bytes: of parameters and buffers.
    kv_cache_bytes_per_token: None for models that keep no cache (encoders).
    generation_ms_per_token: with a cache, prompt and all; None for models that do not generate. energy_joules: of the GPU, per
    sequence; None where it has no counter. test_examples: those that quality is measured on, None where there are only totals;
    calibration_examples: those that the task has for scoring heads, None for other data. machine: device, threads and torch that
    the times are of; None in older files.
    """

    quality: dict[str, float]
    parameters: int
    attention_flops: int
    sequence_length: int
    kv_cache_bytes_per_token: int | None
    latency_p50_ms: float
    latency_p95_ms: float
    throughput: float
    peak_activation_bytes: int
    weight_bytes: int | None = None
    model_flops: int | None = None
    generation_ms_per_token: float | None = None
    energy_joules: float | None = None
    test_examples: int | None = None
    calibration_examples: int | None = None
    machine: str | None = None

    def data(self) -> str:
        """How much quality rests on, in words; empty where nothing tells."""
        counts = (
            (self.test_examples, "test examples" if self.test_examples != 1 else "test example"),
            (self.calibration_examples, "for calibration"),
        )
        return ", ".join(f"{count:,} {name}" for count, name in counts if count is not None)

    def __rich__(self) -> Table:
        table = Table("", "model", title=self.data() or None, title_justify="left", caption=self.machine, caption_justify="left")
        for metric, value in self.quality.items():
            table.add_row(metric, f"{value:.4f}")
        for name, (label, form) in COSTS.items():
            if getattr(self, name) is not None:
                table.add_row(label.format(tokens=self.sequence_length), form.format(getattr(self, name)))
        return table


COSTS = {  # field of Evaluation -> its name in tables, the form of its values
    "parameters": ("parameters", "{:,}"),
    "weight_bytes": ("weight bytes", "{:,}"),
    "model_flops": ("model FLOPs ({tokens} tokens)", "{:.3g}"),
    "attention_flops": ("attention FLOPs ({tokens} tokens)", "{:.3g}"),
    "kv_cache_bytes_per_token": ("key/value bytes per token", "{:,}"),
    "latency_p50_ms": ("latency p50, ms", "{:.1f}"),
    "latency_p95_ms": ("latency p95, ms", "{:.1f}"),
    "throughput": ("throughput, sequences/s", "{:.1f}"),
    "generation_ms_per_token": ("generation, ms/token", "{:.2f}"),
    "peak_activation_bytes": ("peak activation bytes", "{:,}"),
    "energy_joules": ("energy, J/sequence", "{:.3g}"),
}
NOTHING = "–"
FEW = 50  # test examples: at 50 an accuracy of 0.8 is still uncertain by 0.11 either way (95 %)
_told: WeakValueDictionary[int, EvaluationData] = WeakValueDictionary()  # by id: data may have no hash
log = logging.getLogger("headprune")


@dataclass(frozen=True)
class Comparison:
    """Dense and pruned, measured in turn in the same run. differences: metric -> pruned minus dense, for metrics of examples."""

    task: str
    headline: str
    dense: Evaluation
    pruned: Evaluation
    higher_is_better: bool = True  # of the headline
    differences: dict[str, Interval] = field(default_factory=dict)

    def ratio(self, name: str) -> float:
        """Pruned over dense, of a field of Evaluation or a metric; NaN where dense is 0 or one was not measured."""
        dense, pruned = (found.quality.get(name, getattr(found, name, None)) for found in (self.dense, self.pruned))
        return pruned / dense if dense and pruned is not None else math.nan

    def shown_ratio(self, name: str) -> str:
        ratio = self.ratio(name)
        return NOTHING if math.isnan(ratio) else f"{ratio:.3f}"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Comparison:
        """Raises KeyError or TypeError where something is missing."""
        models = {name: Evaluation(**content[name]) for name in ("dense", "pruned")}
        differences = {name: Interval(**found) for name, found in content.get("differences", {}).items()}
        return cls(**{**content, **models, "differences": differences})

    def columns(self) -> tuple[str, ...]:
        """The heads of `rows`."""
        level = next((f"{found.level:.0%}" for found in self.differences.values()), "")
        return ("", "dense", "pruned", "pruned / dense", *([f"difference [{level} interval]"] if level else []))

    def rows(self) -> list[tuple[str, ...]]:
        """(name, dense, pruned, pruned over dense, difference where there are any), as tables show them."""
        rows = []
        for metric in self.dense.quality:
            lower = metric == self.headline and not self.higher_is_better
            values = (f"{found.quality[metric]:.4f}" for found in (self.dense, self.pruned))
            difference = str(self.differences[metric]) if metric in self.differences else ""
            rows.append((f"{metric} (lower is better)" if lower else metric, *values, self.shown_ratio(metric), difference))
        for name, (label, form) in COSTS.items():
            costs = [getattr(found, name) for found in (self.dense, self.pruned)]
            if costs != [None, None]:
                shown = (NOTHING if cost is None else form.format(cost) for cost in costs)
                rows.append((label.format(tokens=self.dense.sequence_length), *shown, self.shown_ratio(name), ""))
        return [row[: len(self.columns())] for row in rows]

    def __rich__(self) -> Table:
        title = ", ".join(filter(None, (self.task, "one run", self.dense.data())))
        table = Table(*self.columns(), title=title, title_justify="left", caption=self.dense.machine, caption_justify="left")
        for row in self.rows():
            table.add_row(*row)
        return table


def evaluate(
    model: nn.Module, data: EvaluationData | Callable[[nn.Module], Any], *, inputs: Mapping[str, Tensor] | None = None,
    repeats: int = 30, progress: Progress | None = None,
) -> Evaluation:  # fmt: skip
    """Quality of `model` on `data`, and what the model costs.

    data: a task, `Perplexity`, `Classification`, `ImageClassification`, `Regression`, `Retrieval` or `LanguageModelHarness` of
    headprune.evaluation; or any function of a model (see `CallableMetric`), with inputs= for `model(**inputs)` to measure costs.
    repeats: timed forward passes.
    Raises InvalidInput for other data, or a function without inputs.
    """
    data = data_of(data, inputs)
    check_arguments(evaluate, locals())
    return evaluations({"model": model}, data, repeats, progress)[0]["model"]


def compare(
    dense: nn.Module, pruned: nn.Module, data: EvaluationData | Callable[[nn.Module], Any], *,
    inputs: Mapping[str, Tensor] | None = None, repeats: int = 30, progress: Progress | None = None,
) -> Comparison:  # fmt: skip
    """Both models on the same data, as `evaluate`; latency is measured in turn, dense, pruned, dense, ..."""
    data = data_of(data, inputs)
    check_arguments(compare, locals())
    found, examples = evaluations({"dense": dense, "pruned": pruned}, data, repeats, progress)
    before, after = examples["dense"] or {}, examples["pruned"] or {}
    differences = {name: paired_bootstrap(metric, after[name]) for name, metric in before.items() if len(metric.rows) > 1}
    return Comparison(data.name, data.headline, found["dense"], found["pruned"], data.higher_is_better, differences)


def quality_of(model: nn.Module, data: EvaluationData, progress: Progress | None = None) -> dict[str, float]:
    """Each metric of `model`; nothing of what it costs."""
    with in_eval_mode(model):
        metrics = data.examples(model, progress)
        tell_few(data, count_of(data, metrics))
        return data.evaluate(model, progress) if metrics is None else values_of(metrics)


def data_of(data: EvaluationData | Callable[[nn.Module], Any], inputs: Mapping[str, Tensor] | None) -> EvaluationData:
    if isinstance(data, EvaluationData):
        return data
    if not callable(data):
        raise InvalidInput(
            f"cannot evaluate on {type(data).__name__}; give one of headprune.evaluation (Perplexity(text, tokenizer), "
            "Classification(batches), ...), or a function of the model with inputs=."
        )
    if not inputs:
        raise InvalidInput("a function as the metric needs inputs=, a mapping for model(**inputs) that costs are measured with.")
    return CallableMetric(data, inputs)


def evaluations(
    models: dict[str, nn.Module], data: EvaluationData, repeats: int, progress: Progress | None
) -> tuple[dict[str, Evaluation], dict[str, dict[str, Metric] | None]]:
    """Each model's evaluation, and the examples that its metrics are of."""
    whole_number("repeats", repeats)
    with ExitStack() as stack:
        for model in models.values():
            stack.enter_context(in_eval_mode(model))
        return evaluations_in_eval_mode(models, data, repeats, progress)


def evaluations_in_eval_mode(
    models: dict[str, nn.Module], data: EvaluationData, repeats: int, progress: Progress | None
) -> tuple[dict[str, Evaluation], dict[str, dict[str, Metric] | None]]:
    """As `evaluations`."""
    inputs, prompt = data.latency_inputs(), data.prompt()
    latency = measure_latency(models, inputs, repeats)
    generation = dict.fromkeys(models) if prompt is None else measure_generation(models, prompt)
    energy = measure_energy(models, inputs)
    found: dict[str, Evaluation] = {}
    examples: dict[str, dict[str, Metric] | None] = {}
    metrics = None
    for name, model in models.items():
        with own_attention(model):
            sites = attention_sites(model, quantised=True)
            length = sequence_length(model, sites, inputs)
            counts = count_tokens_of_sites(model, sites, partial(model, **placed(model, inputs)))
        examples[name] = metrics = data.examples(model, progress)
        found[name] = Evaluation(
            quality=data.evaluate(model, progress) if metrics is None else values_of(metrics),
            parameters=count_parameters(model),
            attention_flops=attention_flops(sites, counts) // rows_of(inputs),
            sequence_length=length,
            kv_cache_bytes_per_token=cached_bytes_per_token(model, sites, next(model.parameters()).element_size()),
            latency_p50_ms=latency[name].p50_ms,
            latency_p95_ms=latency[name].p95_ms,
            throughput=latency[name].throughput,
            peak_activation_bytes=peak_activation_bytes(model, inputs),
            weight_bytes=weight_bytes(model),
            model_flops=model_flops(model, inputs),
            generation_ms_per_token=generation[name],
            energy_joules=energy[name],
            test_examples=count_of(data, metrics),
            calibration_examples=data.calibration_examples,
            machine=machine_name(device_of(model)),
        )
    tell_few(data, count_of(data, metrics))
    return found, examples


def count_of(data: EvaluationData, metrics: Mapping[str, Metric] | None) -> int | None:
    """Test examples; None where there are totals alone."""
    most = max((len(metric.rows) for metric in (metrics or {}).values()), default=0)
    return None if not most or (most == 1 and data.totals) else most


def tell_few(data: EvaluationData, count: int | None) -> None:
    """A line in the log, once for the same data, where quality rests on few examples."""
    if count is not None and count < FEW and _told.get(id(data)) is not data:
        _told[id(data)] = data
        log.warning(
            "quality is measured on %d test example%s; with fewer than %d, single ones decide. Give more: %s.",
            count, "" if count == 1 else "s", FEW, data.more,
        )  # fmt: skip


def values_of(metrics: Mapping[str, Metric]) -> dict[str, float]:
    return {name: metric.value for name, metric in metrics.items()}
