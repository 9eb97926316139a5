"""What measures each need; importing this package registers them."""

from headprune.scoring.observers import (
    attention,
    attention_distance,
    attention_pattern,
    gate_gradient,
    gram,
    output_norm,
    probe,
    weights,
)

__all__ = [
    "attention",
    "attention_distance",
    "attention_pattern",
    "gate_gradient",
    "gram",
    "output_norm",
    "probe",
    "weights",
]
