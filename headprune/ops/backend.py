"""Which implementation runs an operator, decided in one place.

Each operator has a list of implementations in order of preference. An implementation says why it cannot take a call
(`refuses`), so that `headprune doctor` can print what runs and why the others do not. The reference refuses nothing.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from headprune.errors import InvalidInput, unknown_name


@dataclass(frozen=True)
class Implementation:
    """One way to run an operator. `missing()` says why it cannot run on this machine at all, `refuses(call)` why not this
    call; both give None where it can. `run` takes the call (and for a backward what its operator adds)."""

    backend: str
    run: Callable[..., Any]
    refuses: Callable[[Any], str | None]
    missing: Callable[[], str | None] = lambda: None


_implementations: dict[str, list[Implementation]] = {}
_forced: ContextVar[str | None] = ContextVar("headprune_backend", default=None)
_told: set[str] = set()


def register(operator: str, implementation: Implementation) -> None:
    """Appends `implementation` to the operator's list: first registered, first asked."""
    _implementations.setdefault(operator, []).append(implementation)


def operators() -> dict[str, tuple[Implementation, ...]]:
    """Every operator with its implementations, in order of preference."""
    return {name: tuple(found) for name, found in _implementations.items()}


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Forces one backend ("cpp", "cuda", "gluon", "triton", "triton-decode", "reference") inside the block.

    A call that it refuses raises InvalidInput, as does an unknown name.
    """
    known = {implementation.backend for found in _implementations.values() for implementation in found}
    if name not in known:
        raise unknown_name("backend", name, known)
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def forced() -> str | None:
    """The backend that `backend` forces here, or None."""
    return _forced.get()


def choose(operator: str, call: Any) -> Implementation:
    """The implementation that will run `call`."""
    only = forced()
    reasons: list[str] = []
    for implementation in _implementations[operator]:
        if only not in (None, implementation.backend):
            continue
        reason = implementation.missing() or implementation.refuses(call)
        if reason is None:
            if implementation.backend == "reference" and only is None:
                tell_once(operator, reasons)
            return implementation
        line = f"{implementation.backend}: {reason}"
        if line not in reasons:  # a backend may be listed twice: where it is the faster one, and where it is the only one
            reasons.append(line)
    raise InvalidInput(f"no backend runs this {operator} ({'; '.join(reasons) or f'{only} does not have it'}).")


def reference(operator: str) -> Implementation:
    """The implementation in plain PyTorch, which refuses nothing."""
    return next(found for found in _implementations[operator] if found.backend == "reference")


def tell_once(operator: str, reasons: list[str]) -> None:
    message = f"headprune: {operator} runs through the PyTorch reference, which is slow ({'; '.join(reasons)})."
    if reasons and message not in _told:
        _told.add(message)
        warnings.warn(message, stacklevel=2)
