"""Tasks of lm-evaluation-harness, through its Python API."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from headprune.errors import HeadpruneError, InvalidInput
from headprune.evaluation.data import EvaluationData, Progress
from headprune.evaluation.metric import Metric, mean

LOWER = {"perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte", "brier_score", "ter"}
PROMPT = "The quick brown fox jumps over the lazy dog. "


class LanguageModelHarness(EvaluationData):
    """Metrics "TASK METRIC" of tasks of lm-evaluation-harness (pip install lm-eval), such as "arc_easy acc"; the first leads.

    Metrics that are means over examples (accuracies) come with their examples, so that differences get intervals; others
    (perplexities) as totals. options: further arguments of lm_eval.simple_evaluate, e.g. limit, num_fewshot, task_manager. Costs
    are measured with 4 rows of `tokens` tokens. Raises InvalidInput where lm-eval is not installed.
    """

    name = "lm-evaluation-harness"
    headline = ""
    higher_is_better = True
    totals = True

    def __init__(self, tasks: Sequence[Any], tokenizer: Any, *, batch: int = 8, tokens: int = 128, **options: Any) -> None:
        self.tasks, self.tokenizer, self.batch, self.options = list(tasks), tokenizer, batch, options
        if not self.tasks:
            raise InvalidInput("give at least one task of lm-evaluation-harness, such as arc_easy.")
        ids = tokenizer(PROMPT * tokens, add_special_tokens=False, verbose=False)["input_ids"][:tokens]
        self.inputs = {"input_ids": torch.tensor([ids] * 4)}
        harness()

    def examples(self, model: nn.Module, progress: Progress | None = None) -> dict[str, Metric]:
        lm_eval, wrapped_class = harness()
        wrapped = wrapped_class(pretrained=model, tokenizer=self.tokenizer, batch_size=self.batch)
        options = {"log_samples": True, "bootstrap_iters": 0} | self.options
        with refused_in_one_line(self.tasks):
            found = lm_eval.simple_evaluate(model=wrapped, tasks=self.tasks, **options)
        metrics: dict[str, Metric] = {}
        for task, results in found["results"].items():
            for key, value in results.items():
                metric, _, filtered = key.partition(",")
                if isinstance(value, (int, float)) and filtered and not metric.endswith("_stderr"):
                    name = f"{task} {metric}" if filtered == "none" else f"{task} {metric} ({filtered})"
                    metrics[name] = metric_of(value, found.get("samples", {}).get(task, ()), metric, filtered)
        if not metrics:
            raise InvalidInput(f"lm-evaluation-harness gave no number for {', '.join(map(str, self.tasks))}.")
        self.headline = next(iter(metrics))
        self.higher_is_better = self.headline.split()[1] not in LOWER
        return metrics

    def latency_inputs(self) -> Mapping[str, Tensor]:
        return self.inputs


def metric_of(value: float, samples: Sequence[Mapping[str, Any]], metric: str, filtered: str) -> Metric:
    """The metric by its examples where their mean is it, else as one total."""
    wanted = (one for one in samples if one.get("filter", "none") == filtered)
    values: list[Any] = [one.get(metric) for one in sorted(wanted, key=lambda one: one.get("doc_id", 0))]
    if len(values) > 1 and all(isinstance(one, (bool, int, float)) for one in values):
        rows = torch.tensor([float(one) for one in values], dtype=torch.float64)
        if abs(float(rows.mean()) - value) <= 1e-6 * max(1.0, abs(value)):
            return Metric(rows, mean)
    return Metric(torch.tensor([float(value)]), mean)


@contextmanager
def refused_in_one_line(tasks: Sequence[Any]) -> Iterator[None]:
    """Turns what the harness raises for a task that it does not know, or whose data it cannot get, into InvalidInput."""
    try:
        yield
    except HeadpruneError:
        raise
    except (OSError, KeyError, ValueError, ImportError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InvalidInput(
            f"lm-evaluation-harness cannot run {', '.join(map(str, tasks))}: {type(error).__name__}: {reason}. "
            "`lm_eval --tasks list` names the tasks; their data must be on this machine, or HF_HUB_OFFLINE=0 lets them be fetched."
        ) from error


def harness() -> tuple[Any, Any]:
    """(lm_eval, its class for transformers models)."""
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise InvalidInput(f"this needs lm-evaluation-harness: pip install lm-eval ({error}).") from None
    return lm_eval, HFLM
