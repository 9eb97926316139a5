"""What makes a part of a page, by name, and how parts get into their pages."""

from __future__ import annotations

import re
from collections.abc import Callable

_generators: dict[str, Callable[..., str]] = {}
PLACE = re.compile(r"^<!-- generated: (.+?) -->$", re.MULTILINE)


def generator(name: str) -> Callable:
    """Registers a function of the place's further words that gives Markdown."""

    def register(function: Callable[..., str]) -> Callable[..., str]:
        _generators[name] = function
        return function

    return register


def fill(markdown: str) -> str:
    """`markdown` with its generated parts in their places. Raises ValueError for a name that nothing makes."""

    def part(place: re.Match) -> str:
        name, *arguments = place[1].split()
        if name not in _generators:
            raise ValueError(f"nothing generates {name!r}; known: {', '.join(sorted(_generators))}")
        return _generators[name](*arguments)

    return PLACE.sub(part, markdown)


def plain(text: str) -> str:
    """`text` as Markdown that shows exactly it, also within a table."""
    return re.sub(r"([\\`*_\[\]<>|#&~^])", lambda found: f"&#{ord(found[0])};", " ".join(text.split()))


def table(heads: list[str], rows: list[list[str]], right: int = 0) -> str:
    """A Markdown table; the last `right` columns are numbers."""
    rule = ["---"] * (len(heads) - right) + ["---:"] * right
    return "\n".join(f"| {' | '.join(row)} |" for row in [heads, rule, *rows])
