"""Another forward for one module of a model: the module takes a subclass of its own class, made on the fly.

Everything else stays what it was: weights and their names, hooks, isinstance, the printed class name. deepcopy and pickle
work, because the class can be made again from the two it consists of.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from torch import nn

# A behaviour is mixed into a module, and types shall know it; at run time it has no base of its own.
if TYPE_CHECKING:
    Behaviour = nn.Module
else:
    Behaviour = object


def behave(module: nn.Module, behaviour: type) -> None:
    """`module`'s methods now come from `behaviour` first, then from the class that it had at first."""
    module.__class__ = combined(behaviour, original_class(module))


def original_class(module: nn.Module) -> type:
    original: type = getattr(type(module), "headprune_original", type(module))
    return original


@cache
def combined(behaviour: type, original: type) -> type:
    namespace = {"__module__": original.__module__, "__reduce__": reduce_combined, "headprune_original": original}
    return type(original.__name__, (behaviour, original), namespace | {"headprune_behaviour": behaviour})


def reduce_combined(module: nn.Module) -> tuple[Any, ...]:
    kind = type(module)
    return rebuild, (vars(kind)["headprune_behaviour"], vars(kind)["headprune_original"]), module.__dict__


def rebuild(behaviour: type, original: type) -> nn.Module:
    kind = combined(behaviour, original)
    made: nn.Module = object.__new__(kind)
    return made
