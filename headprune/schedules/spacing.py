"""How a target is spread over the steps of a schedule: registered functions of the share of steps done."""

from __future__ import annotations

import math
from collections.abc import Callable

from headprune.errors import InvalidInput, unknown_name, whole_number

STEPS = 4  # where it is not said how many
Spacing = Callable[[float, float], float]
_spacings: dict[str, Spacing] = {}


def spacing(name: str) -> Callable[[Spacing], Spacing]:
    """Registers `function(target, done)`: the fraction to have removed when the share `done` in [0, 1] of the steps is over."""

    def register(function: Spacing) -> Spacing:
        _spacings[name] = function
        return function

    return register


def get_spacing(name: str) -> Spacing:
    if name not in _spacings:
        raise unknown_name("spacing", name, _spacings)
    return _spacings[name]


@spacing("linear")
def linear(target: float, done: float) -> float:
    """The same amount at every step."""
    return target * done


@spacing("cubic")
def cubic(target: float, done: float) -> float:
    """s_f (1 - (1 - t)^3): much at first, little at the end (Zhu & Gupta 2017, from 0)."""
    return target * (1 - (1 - done) ** 3)


@spacing("geometric")
def geometric(target: float, done: float) -> float:
    """The same share of what is left at every step (Frankle & Carbin 2019)."""
    left: float = (1 - target) ** done
    return 1 - left


def check_spread(steps: int | None, per_step: float | None, spacing: str) -> None:
    """InvalidInput where both steps and per_step are given, one is out of range, or the spacing is unknown."""
    get_spacing(spacing)
    if steps is not None and per_step is not None:
        raise InvalidInput(f"steps={steps}, per_step={per_step}: give one of them.")
    if steps is not None:
        whole_number("steps", steps)
    if per_step is not None and not 0 < per_step < 1:
        raise InvalidInput(f"per_step is {per_step}; expected a fraction of the original, above 0 and below 1.")


def targets(target: float, steps: int | None, per_step: float | None, spacing: str) -> list[float]:
    """The fraction to have removed after each step; the last is `target` itself.

    steps: how many (default 4), spread by `spacing`; or per_step: this much more at each step (0.1: a tenth of the original's).
    Raises InvalidInput as `check_spread`.
    """
    check_spread(steps, per_step, spacing)
    if per_step is not None:
        count = max(1, math.ceil(target / per_step - 1e-9))
        return [min(target, per_step * number) for number in range(1, count)] + [target]
    steps, reached = STEPS if steps is None else steps, get_spacing(spacing)
    return [reached(target, number / steps) for number in range(1, steps)] + [target]
