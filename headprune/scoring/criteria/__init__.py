"""The criteria that come with headprune; importing this package registers them."""

from headprune.scoring.criteria import (
    ablation,
    fisher,
    gate_gradient,
    integrated_gradient,
    least_squares,
    magnitude,
    random,
    regression,
    shapley,
)

__all__ = [
    "ablation",
    "fisher",
    "gate_gradient",
    "integrated_gradient",
    "least_squares",
    "magnitude",
    "random",
    "regression",
    "shapley",
]
