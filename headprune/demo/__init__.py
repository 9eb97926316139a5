"""Models that need no download: one inside a PyPI package, one trained on the spot."""

from headprune.demo.minilm import minilm_path
from headprune.demo.stdlib_lm import cached_folder, stdlib_lm_path

__all__ = ["cached_folder", "minilm_path", "stdlib_lm_path"]
