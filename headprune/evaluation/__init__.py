"""Quality and cost, always dense against pruned in the same run."""

from headprune.evaluation.evaluate import Comparison, Evaluation, compare, evaluate

__all__ = ["Comparison", "Evaluation", "compare", "evaluate"]
