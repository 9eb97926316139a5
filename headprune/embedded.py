"""The models that come with headprune: what each is for, told without importing what makes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Embedded:
    """A model that needs no folder: what gives one (training it first, where need be), its task, the demo's criterion and on how
    many calibration batches it scores (None: all), and whether it re-solves feed-forwards."""

    folder: Callable[[Progress | None], Path]
    task: str
    criterion: str
    opening: Callable[[], str]  # what to tell someone who waits for it
    batches: int | None = None
    feed_forward: bool = False


def minilm_folder(progress: Progress | None) -> Path:
    from headprune.demo import minilm_path

    return minilm_path()


def stdlib_lm_folder(progress: Progress | None) -> Path:
    from headprune.demo import stdlib_lm_path

    return stdlib_lm_path(progress)


def stdlib_lm_opening() -> str:
    from headprune.demo import cached_folder

    folder = cached_folder()
    return "load stdlib-lm" if folder.exists() else f"train stdlib-lm, once, for a few minutes (kept in {folder.parent})"


EMBEDDED = {
    "minilm": Embedded(minilm_folder, "docstring-retrieval", "fisher_least_squares", lambda: "load minilm", 6),
    "stdlib-lm": Embedded(stdlib_lm_folder, "standard-library-text", "fisher", stdlib_lm_opening, feed_forward=True),
}
