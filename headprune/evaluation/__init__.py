"""Quality and cost, always dense against pruned in the same run."""

from headprune.evaluation.estimate import Estimate, estimate
from headprune.evaluation.evaluate import Comparison, Evaluation, compare, evaluate
from headprune.evaluation.latency_table import machines_here, measure_latency_table

__all__ = ["Comparison", "Estimate", "Evaluation", "compare", "estimate", "evaluate", "machines_here", "measure_latency_table"]
