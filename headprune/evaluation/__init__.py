"""Quality and cost, always dense against pruned in the same run."""

from headprune.evaluation.bootstrap import Interval, paired_bootstrap
from headprune.evaluation.callable_metric import CallableMetric
from headprune.evaluation.classification import Classification, ImageClassification, Regression
from headprune.evaluation.data import EvaluationData
from headprune.evaluation.estimate import Estimate, estimate
from headprune.evaluation.evaluate import Comparison, Evaluation, compare, evaluate
from headprune.evaluation.latency_table import measure_latency_table
from headprune.evaluation.lm_harness import LanguageModelHarness
from headprune.evaluation.machine import machines_here
from headprune.evaluation.metric import Metric
from headprune.evaluation.perplexity import Perplexity
from headprune.evaluation.retrieval import Retrieval
from headprune.evaluation.trace import write_trace

__all__ = [
    "CallableMetric",
    "Classification",
    "Comparison",
    "Estimate",
    "Evaluation",
    "EvaluationData",
    "ImageClassification",
    "Interval",
    "LanguageModelHarness",
    "Metric",
    "Perplexity",
    "Regression",
    "Retrieval",
    "compare",
    "estimate",
    "evaluate",
    "machines_here",
    "measure_latency_table",
    "paired_bootstrap",
    "write_trace",
]
