"""Every error that headprune raises on purpose, under one class: the command line turns it into one line and exit code 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from operator import index
from typing import Any

MOST_LISTED = 60  # names in one message


class HeadpruneError(Exception):
    """Something that the caller can put right; the message says what was found, what was expected and what to do."""


class InvalidInput(HeadpruneError, ValueError):
    """An argument, recipe key or file that cannot be used as it is."""


class UnsupportedModel(HeadpruneError):
    """A model (or one attention in it) whose heads headprune cannot find or cut safely."""


class InvalidPlan(HeadpruneError, ValueError):
    """A pruning plan that does not fit the model or contradicts itself."""


class InfeasibleBudget(HeadpruneError, ValueError):
    """A budget that no plan can meet under the given constraints."""


class CorruptCheckpoint(HeadpruneError):
    """A folder whose files do not belong together, are missing or were written by a newer headprune."""


def unknown_name(kind: str, name: object, known: Iterable[str]) -> InvalidInput:
    """The error for a `name` that is none of the `known` ones; it names the nearest right one and lists them all, unless a near one
    stands for very many."""
    known = sorted(known)
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    every = "" if near and len(known) > MOST_LISTED else f" Known: {', '.join(known)}."
    return InvalidInput(f"unknown {kind} {name!r}.{hint}{every}")


def whole_number(name: str, value: Any, least: int = 1) -> int:
    """`value`, of any integer type, as an int; InvalidInput where it is none, or below `least`."""
    try:
        found = index(value)
    except TypeError:
        found = least - 1
    if found < least or isinstance(value, bool):
        raise InvalidInput(f"{name} is {value!r:.80}; expected a whole number, {least} or more.")
    return found
