"""The criteria that come with headprune; importing this package registers them."""

from headprune.scoring.criteria import (
    attention_redundancy,
    confidence,
    copying,
    entropy,
    fisher,
    gate_gradient,
    least_squares,
    magnitude,
    output_norm,
    random,
    specialisation,
)

__all__ = [
    "attention_redundancy",
    "confidence",
    "copying",
    "entropy",
    "fisher",
    "gate_gradient",
    "least_squares",
    "magnitude",
    "output_norm",
    "random",
    "specialisation",
]
