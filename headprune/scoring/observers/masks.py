"""Observes losses with heads switched off: one by one, in random orders, in random sets, and on the way to closed gates."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from headprune.scoring.batch_identity import checksum
from headprune.scoring.gate_path import integrated_gradients
from headprune.scoring.head_masks import by_site, head_counts, one_out, random_masks
from headprune.scoring.masked_losses import MaskedBatch, MaskedLosses
from headprune.scoring.observations import Need
from headprune.scoring.observer import Observer, Setting, observes
from headprune.scoring.shapley import permutation_marginals


class MaskObserver(Observer):
    """Collects rows from each batch: field of SiteObservations -> rows of each reached site, or the same rows for all sites.

    Random choices follow from the batch alone, so that ranks, and a pass that was cut short, find the same.
    """

    runs = "itself"
    per_head: ClassVar[tuple[str, ...]]  # fields [rows, query_heads]
    per_row: ClassVar[tuple[str, ...]] = ()  # fields [rows]

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.masked = MaskedLosses(setting.model, setting.sites, setting.loss_fn)
        self.counts = head_counts(setting.sites)
        self._rows: list[dict[str, dict[str, Tensor]]] = []
        self._reached: set[str] = set()

    def after_batch(self, batch: Any, loss: Tensor | None) -> None:
        found = self.masked.on(batch)
        self._reached |= set(found.reached)
        reached = {name: count for name, count in self.counts.items() if name in found.reached}
        rows = self.measure(found, reached, torch.Generator().manual_seed(checksum(batch)))
        for name in self.counts.keys() - rows.keys():  # what does not run through a site does not depend on its heads
            rows[name] = {field: torch.zeros_like(next(iter(rows.values()))[field]) for field in self.per_row}
            number = len(next(iter(next(iter(rows.values())).values())))
            rows[name] |= {field: torch.zeros(number, self.counts[name]) for field in self.per_head}
        self._rows.append(rows)

    def measure(self, found: MaskedBatch, counts: dict[str, int], generator: torch.Generator) -> dict[str, dict[str, Tensor]]:
        """Reached site -> field -> rows. counts: heads of each reached site. Rows of another site are 0 unless they are given."""
        raise NotImplementedError

    def found(self) -> dict[str, dict[str, Tensor]]:
        empty = {field: torch.zeros(0) for field in self.per_row}
        return {
            name: {
                field: torch.cat([start, *(rows[name][field] for rows in self._rows)])
                for field, start in {**empty, **{field: torch.zeros(0, count) for field in self.per_head}}.items()
            }
            for name, count in self.counts.items()
        }

    def reached(self) -> set[str]:
        return set(self._reached)


@observes(Need.ABLATION)
class LeaveOneOut(MaskObserver):
    """Every head removed by itself."""

    per_head = ("ablation",)

    def measure(self, found: MaskedBatch, counts: dict[str, int], generator: torch.Generator) -> dict[str, dict[str, Tensor]]:
        losses = found.losses(by_site(one_out(counts), counts))
        changes = by_site((losses - found.dense).T, counts)
        return {name: {"ablation": rows} for name, rows in changes.items()}


@observes(Need.SHAPLEY)
class ShapleyMarginals(MaskObserver):
    """Heads removed one after the other, in random orders."""

    per_head, per_row = ("shapley",), ("shapley_samples",)
    permutations, stop = 8, 0.01

    def measure(self, found: MaskedBatch, counts: dict[str, int], generator: torch.Generator) -> dict[str, dict[str, Tensor]]:
        marginals = permutation_marginals(
            lambda masks: found.losses(by_site(masks, counts)).double().mean(dim=1), float(found.dense.double().mean()),
            sum(counts.values()), self.permutations, generator, self.stop,
        )  # fmt: skip
        samples = torch.full((self.permutations,), float(len(found.dense)))
        return {name: {"shapley": rows, "shapley_samples": samples} for name, rows in by_site(marginals.float(), counts).items()}


@observes(Need.MASK_TRIALS)
class MaskTrials(MaskObserver):
    """Random sets of heads removed at once."""

    per_head, per_row = ("trial_masks",), ("trial_changes", "trial_samples")
    trials, keep = 64, 0.8

    def measure(self, found: MaskedBatch, counts: dict[str, int], generator: torch.Generator) -> dict[str, dict[str, Tensor]]:
        # Of all sites: one that this batch leaves out makes no difference, whichever of its heads are gone.
        masks = by_site(random_masks(self.counts, self.trials, self.keep, generator), self.counts)
        changes = (found.losses({name: masks[name] for name in counts}) - found.dense).mean(dim=1)
        samples = torch.full((self.trials,), float(len(found.dense)))
        rows = {"trial_changes": changes, "trial_samples": samples}
        return {name: {"trial_masks": own, **rows} for name, own in masks.items()}


@observes(Need.INTEGRATED_GRADIENT)
class IntegratedGradients(MaskObserver):
    """The way from closed gates to open ones."""

    per_head = ("integrated_gradient",)
    points = 9

    def measure(self, found: MaskedBatch, counts: dict[str, int], generator: torch.Generator) -> dict[str, dict[str, Tensor]]:
        return {name: {"integrated_gradient": rows} for name, rows in integrated_gradients(found, self.points).items()}
