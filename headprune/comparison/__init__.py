"""Head pruning beside other ways to make the same model smaller, each measured on it."""

from headprune.comparison import methods  # noqa: F401 (it registers them)
from headprune.comparison.comparing import compare_methods
from headprune.comparison.method import Compressed, Refused, Subject, comparison_method, comparison_methods
from headprune.comparison.row import MethodComparison, MethodRow

__all__ = [
    "Compressed",
    "MethodComparison",
    "MethodRow",
    "Refused",
    "Subject",
    "compare_methods",
    "comparison_method",
    "comparison_methods",
]
