"""What measures one need: a small class for each, registered by itself, that the one pass over the data calls."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from headprune.errors import InvalidInput
from headprune.models.batches import by_name
from headprune.models.site import AttentionSite
from headprune.models.token_kinds import TokenKinds
from headprune.models.tokens import SiteTokenMask
from headprune.scoring.observations import Need

LossFunction = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True)
class Setting:
    """What is observed: a model in eval mode, its sites, and how a batch is run, its loss found and its padding told; the rest
    as in `observe`. headless: sites that have lost all their heads, where nothing is to be measured. own_masks: whether
    token_mask reads the batches' own."""

    model: nn.Module
    sites: tuple[AttentionSite, ...]
    loss_fn: LossFunction | None
    token_mask: SiteTokenMask
    token_kinds: TokenKinds | None = None
    gram_device: torch.device | str | None = None
    headless: tuple[AttentionSite, ...] = ()
    own_masks: bool = True

    def loss(self, batch: Any) -> Tensor:
        """The loss of `batch`: per sample [n] where loss_fn gives that, else the mean. Raises InvalidInput where there is none."""
        if self.loss_fn:
            return checked_losses(self.loss_fn(self.model, batch))
        loss: Tensor | None = getattr(by_name(self.model, batch), "loss", None)
        if loss is None:
            raise InvalidInput(f"{type(self.model).__name__} returned no loss: put labels into the batches, or give loss_fn.")
        return loss

    def run(self, batch: Any) -> None:
        """A forward pass whose result nobody needs: without loss_fn a batch needs no labels."""
        if self.loss_fn is not None:
            self.loss_fn(self.model, batch)
        else:
            by_name(self.model, batch)


def checked_losses(found: Any) -> Tensor:
    """What a loss_fn gave; InvalidInput unless it is per-sample losses or their mean."""
    if isinstance(found, Tensor) and found.dim() <= 1:
        return found
    shown = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
    raise InvalidInput(f"loss_fn gave {shown}; expected per-sample losses [n] or their mean.")


def refuse_joint(sites: Iterable[AttentionSite]) -> None:
    """InvalidInput where a site has an output projection for each of several streams of tokens."""
    for site in sites:
        if len(site.outputs) > 1:
            names = " and ".join(output.name for output in site.outputs)
            raise InvalidInput(
                f"{site.name} projects its heads twice, by {names}, and what goes into a projection is measured of one alone. "
                "Choose a criterion of gate gradients (fisher), of masks (ablation) or of weights (magnitude_l2)."
            )


class Observer:
    """Measures what one Need names. Subclasses override what they use; hooks that they set are gone after the block.

    runs: what a batch has to go through for this observer: "nothing" (no data is read), "forward", "backward" (forward, then
    the backward pass of the loss with all weights frozen), or "itself": it calls the model in `after_batch` as it likes.
    """

    runs: Literal["nothing", "forward", "backward", "itself"] = "forward"

    def __init__(self, setting: Setting) -> None:
        self.setting = setting

    def watching_pass(self) -> AbstractContextManager[object]:
        """Around all batches."""
        return nullcontext()

    def watching_batch(self, batch: Any) -> AbstractContextManager[object]:
        """Around the forward and backward pass of one batch."""
        return nullcontext()

    def watching_forward(self, batch: Any) -> AbstractContextManager[object]:
        """Around its forward pass alone: what activation checkpointing runs again in the backward pass is not seen twice."""
        return nullcontext()

    def after_batch(self, batch: Any, loss: Tensor | None) -> None:
        """After them. loss: as the pass found it, [n] or scalar, already differentiated; None where no one asked for it."""

    def found(self) -> dict[str, dict[str, Tensor]]:
        """Site name -> field of SiteObservations -> value so far, on the CPU. Called any number of times."""
        raise NotImplementedError

    def reached(self) -> set[str]:
        """The sites through which some batch ran."""
        return {site.name for site in self.setting.sites}


_observers: dict[Need, type[Observer]] = {}


def observes(need: Need) -> Callable[[type[Observer]], type[Observer]]:
    """Registers the decorated class as what measures `need`; a later one takes the earlier one's place."""

    def register(observer: type[Observer]) -> type[Observer]:
        _observers[need] = observer
        return observer

    return register


def observer_of(need: Need) -> type[Observer]:
    return _observers[need]
