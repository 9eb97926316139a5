"""headprune: score, choose, cut and recover attention heads."""

__version__ = "0.1.0"
