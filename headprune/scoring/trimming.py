"""Batches without the places that are padding in all of their samples, which cost as much time as tokens do."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from headprune.models.gating import output_input_hook
from headprune.models.padding import close, complete, lengths_of, part_of
from headprune.scoring.observer import Observer, Setting

log = logging.getLogger("headprune")

WORTH_A_TRY = 0.75  # of a batch's length: the first such batch runs once more as it is, and once trimmed


class Trimming:
    """Batch -> the batch to run: trimmed where padding behind its longest sample is a quarter of it, unless the first such batch
    shows that the loss, its gradient or the states are others without that. Where tokens are counted by a mask of the user's, and
    on a device, whose masks could not be read without waiting for it, batches stay as they are."""

    def __init__(self, setting: Setting, observers: Sequence[Observer]) -> None:
        self.setting, self.runs = setting, {observer.runs for observer in observers}
        self._harmless: bool | None = None

    def __call__(self, batch: Any) -> Any:
        shorter = self._shorter(batch)
        if shorter is None:
            return batch
        if self._harmless is None:
            try:
                expected, found = self._reached(batch), self._reached(shorter)
                self._harmless = len(expected) == len(found) > 0 and all(map(close, expected, found))
            except Exception:  # a loss need not take batches of another length; its own error shows where the batch is run
                self._harmless = False
            log.debug("padding behind all samples is %s", "left out" if self._harmless else "not left out: it makes a difference")
        return shorter if self._harmless else batch

    def _shorter(self, batch: Any) -> Any:
        """The batch trimmed; None where there is too little to gain, or tokens that count would be lost."""
        mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        if self._harmless is False or not self.setting.own_masks or not isinstance(mask, Tensor) or mask.device.type != "cpu":
            return None
        lengths = lengths_of(batch)
        if lengths is None or int(lengths.max()) > WORTH_A_TRY * mask.shape[1]:
            return None
        shorter = part_of(batch, int(lengths.max()))
        sites = [site.name for site in self.setting.sites]
        return shorter if complete(batch, [shorter], sites, self.setting.token_mask) else None

    def _reached(self, batch: Any) -> list[Tensor]:
        """The states of the tokens that count at the last attention; as the pass asks for them the loss before and its gradient
        there behind them."""
        found: list[Tensor] = []
        last = self.setting.sites[-1]
        mask = self.setting.token_mask(last.name, batch)

        def keep(states: Tensor) -> Tensor:
            found.append(states.detach().requires_grad_("backward" in self.runs))
            return found[-1]

        with output_input_hook(last, keep), torch.set_grad_enabled("backward" in self.runs):
            if self.runs.isdisjoint({"backward", "itself"}):
                self.setting.run(batch)
                losses = []
            else:
                losses = [self.setting.loss(batch)]
        gradients = torch.autograd.grad(losses[0].sum(), found) if "backward" in self.runs else ()
        fits = mask is not None and all(states.shape[:-1] == mask.shape for states in found)
        return [*losses, *(states[mask.bool()] if mask is not None and fits else states for states in (*found, *gradients))]
