"""Docstrings of public names, through mkdocstrings: by where each one is defined, as a module often bears its function's name."""

from __future__ import annotations

from functools import reduce

import headprune

from .registry import generator


@generator("api")
def api(*names: str) -> str:
    """names: as a user writes them, "hp.score". Raises ValueError where there is none, or it has no definition of its own."""
    return "\n\n".join(f"::: {defined_at(name)}" for name in names)


def defined_at(name: str) -> str:
    first, *path = name.split(".")
    try:
        found = reduce(getattr, path, headprune if first == "hp" else None)
        return f"{found.__module__}.{found.__qualname__}"
    except AttributeError as error:
        raise ValueError(f"{name} is no public name with a definition: {error}") from error
