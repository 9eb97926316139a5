"""The criteria that come with headprune; importing this package registers them."""

from headprune.scoring.criteria import fisher, gate_gradient, least_squares, magnitude, random

__all__ = ["fisher", "gate_gradient", "least_squares", "magnitude", "random"]
