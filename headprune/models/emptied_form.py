"""What an attention returns beside its output, told from the source of its forward: without heads it returns the same."""

from __future__ import annotations

import inspect
import re

from torch import Tensor

from headprune.models.behaviour import original_class
from headprune.models.emptied import Emptied, EmptiedAlone, EmptiedOnDemand
from headprune.models.site import Foreign
from headprune.models.specialise import empty

ALONE = (Tensor, "torch.Tensor", "Tensor")
WEIGHTS_ON_DEMAND = re.compile(r"if output_attentions else \(\w+,\)")


def empty_alike(module: Foreign, output: str | None) -> None:
    """`empty` for a module that returns its output alone, with its attention weights, or with them where they are asked for."""
    forward = forward_of(module)
    behaviour: type[Emptied] = Emptied
    if returns_alone(module):
        behaviour = EmptiedAlone
    elif WEIGHTS_ON_DEMAND.search(source_of(forward)):
        module.headprune_asked_at = [*inspect.signature(forward).parameters].index("output_attentions") - 1
        behaviour = EmptiedOnDemand
    empty(module, output, behaviour)


def forward_of(module: Foreign) -> Foreign:
    """As its family wrote it."""
    original: Foreign = original_class(module)
    return inspect.unwrap(original.forward)


def returns_alone(module: Foreign) -> bool:
    """Whether it says that it returns its output alone."""
    return inspect.signature(forward_of(module)).return_annotation in ALONE


def source_of(function: Foreign) -> str:
    try:
        return inspect.getsource(function)
    except OSError:  # a model without its source, where most return their weights
        return ""
