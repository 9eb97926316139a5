"""Parts of pages that come from the code and from measurements: `<!-- generated: NAME ARGUMENTS -->` stands where one belongs."""

from . import api, backends, benchmarks, commands, criteria, quality, recipes  # isort: skip (each registers itself)
from .figures import pictures
from .registry import fill

__all__ = ["api", "backends", "benchmarks", "commands", "criteria", "fill", "pictures", "quality", "recipes"]
