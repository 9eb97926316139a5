"""Modules of a model that surgery gives another forward."""

from __future__ import annotations

from torch import nn

from headprune.errors import UnsupportedModel
from headprune.models.behaviour import behave
from headprune.models.emptied import Emptied, EmptiedConv1D, EmptiedLinear
from headprune.models.ibert_forward import EmptiedQuantLinear
from headprune.models.site import Foreign, is_conv1d


def specialise(module: nn.Module, behaviour: type) -> None:
    """`module`'s methods now come from `behaviour` first (headprune.models.behaviour).

    Raises UnsupportedModel where a tool has put another forward on the instance, which would hide ours.
    """
    if "forward" in module.__dict__:
        raise UnsupportedModel(
            f"{type(module).__name__} has had its forward replaced (by accelerate's dispatch, say); undo that before pruning "
            "(accelerate.hooks.remove_hook_from_module(model, recurse=True)) and do it again after."
        )
    behave(module, behaviour)


def empty(module: Foreign, output: str | None, behaviour: type = Emptied) -> None:
    """Makes `module`, whose projections hold no head any more, a no-op.

    output: the attribute of its output projection; None where `module` returns what a sibling then projects.
    behaviour: Emptied, or a subclass with another `result`.
    """
    module.headprune_output = output
    specialise(module, behaviour)


def empty_projection(projection: nn.Module) -> None:
    """For a projection that has no input or output features any more."""
    plain = EmptiedLinear if isinstance(projection, nn.Linear) else EmptiedQuantLinear
    specialise(projection, EmptiedConv1D if is_conv1d(projection) else plain)
