"""What the shell offers behind an option: the names that stand in the registries, read only when it asks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

# Names, or names with what each is.
Names = Callable[[], Iterable[str] | Mapping[str, str]]
Complete = Callable[[str], list[tuple[str, str]]]


def one_of(names: Names) -> Complete:
    """Completes one of `names`."""

    def complete(incomplete: str) -> list[tuple[str, str]]:
        known = names()
        described = known if isinstance(known, Mapping) else dict.fromkeys(known, "")
        return [(name, told) for name, told in described.items() if name.startswith(incomplete)]

    return complete


def some_of(names: Names) -> Complete:
    """Completes the last of several names with commas between, of those that are not there yet."""

    def complete(incomplete: str) -> list[tuple[str, str]]:
        before, comma, last = incomplete.rpartition(",")
        given = {name.strip() for name in before.split(",")}
        return [(f"{before}{comma}{name}", told) for name, told in one_of(names)(last) if name not in given]

    return complete


def models() -> dict[str, str]:
    """Those that need no folder; where nothing of theirs fits, the shell completes folders."""
    from headprune.embedded import EMBEDDED

    return dict.fromkeys(EMBEDDED, "embedded")


def tasks() -> dict[str, str]:
    from headprune.evaluation.tasks import tasks

    return {name: first_line(task) for name, task in tasks().items()}


def criteria() -> dict[str, str]:
    from headprune.scoring import criteria

    return {name: found.summary for name, found in criteria().items()}


def normalizations() -> Iterable[str]:
    from headprune.scoring.score import NORMALIZATIONS

    return NORMALIZATIONS


def engines() -> dict[str, str]:
    from headprune.planning import engines

    return {name: engine.summary for name, engine in engines().items()}


def allocations() -> Iterable[str]:
    from headprune.planning.allocation import allocations

    return allocations()


def granularities() -> Iterable[str]:
    from headprune.planning.units import GRANULARITIES

    return GRANULARITIES


def export_targets() -> dict[str, str]:
    from headprune.surgery.export.target import targets

    return {name: target.summary for name, target in targets().items()}


def recovery_methods() -> Iterable[str]:
    from headprune.recovery.methods import recovery_methods

    return recovery_methods()


def forms() -> Iterable[str]:
    from headprune.recovery.quantise import FORMS

    return FORMS


def compared_methods() -> Iterable[str]:
    from headprune.comparison import comparison_methods

    return comparison_methods()


def devices() -> Iterable[str]:
    from headprune.evaluation.estimate import DEVICES

    return ["cpu", *DEVICES]


def first_line(described: object) -> str:
    return (described.__doc__ or "").strip().split("\n")[0]
