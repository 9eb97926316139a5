"""Parts of pages that come from the code and from measurements: `<!-- generated: NAME ARGUMENTS -->` stands where one belongs."""

from . import commands, criteria  # isort: skip (each registers itself)
from .registry import fill

__all__ = ["commands", "criteria", "fill"]
