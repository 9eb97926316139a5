"""Which layers tolerate pruning: the loss with 1, 2, 3, ... heads of one attention gone, for every attention."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import nn

from headprune.errors import InvalidInput
from headprune.files import read_json, write_json
from headprune.models import attention_sites
from headprune.nn.replace import own_attention
from headprune.scoring.masked_losses import MaskedLosses
from headprune.scoring.observer import LossFunction
from headprune.scoring.scores import HeadScores


@dataclass(frozen=True)
class Sensitivity:
    """dense: mean loss with all heads. order: site -> heads, first to go first. curves: site -> mean loss over `samples` samples
    with the first 0, 1, 2, ... heads of that order gone, all else whole."""

    criterion: str
    samples: int
    dense: float
    order: dict[str, tuple[int, ...]]
    curves: dict[str, tuple[float, ...]]

    def costs(self, scores: HeadScores) -> dict[str, tuple[float, ...]]:
        """Site -> loss increase with 0, 1, 2, ... heads gone; never falling, as a dip is noise that a plan would chase.

        Raises InvalidInput where the curves are of another ranking than `scores`.
        """
        for name, found in scores.items():
            if self.order.get(name) != removal_order(found.tolist()):
                raise InvalidInput(f"the sensitivity is of another order of heads at {name}; measure it with these scores.")
        return {name: tuple(accumulate((loss - self.dense for loss in curve), max)) for name, curve in self.curves.items()}

    def save(self, path: str | Path) -> None:
        """Writes sensitivity.json, through a temporary name: also the data of a plot."""
        write_json(path, "sensitivity", vars(self))

    @classmethod
    def load(cls, path: str | Path) -> Sensitivity:
        """Raises InvalidInput where the file is no sensitivity.json."""
        document = read_json(path, "sensitivity")
        try:
            order = {name: tuple(heads) for name, heads in document["order"].items()}
            curves = {name: tuple(curve) for name, curve in document["curves"].items()}
            return cls(document["criterion"], document["samples"], document["dense"], order, curves)
        except (KeyError, TypeError, AttributeError) as error:
            raise InvalidInput(f"{path} is not a complete sensitivity file: {error!r}.") from None

    def __rich__(self) -> Table:
        """Per attention: how many heads may go for little, and the loss at quarters of its heads."""
        table = Table(title=f"loss with heads gone, by {self.criterion}; dense {self.dense:.4g}", title_justify="left")
        for column in ("attention", "free heads", "25 %", "50 %", "75 %", "all"):
            table.add_column(column, overflow="fold")
        for name, curve in self.curves.items():
            free = sum(1 for loss in curve[1:] if loss <= self.dense + 0.01 * abs(self.dense))
            quarters = [curve[round(share * (len(curve) - 1))] for share in (0.25, 0.5, 0.75, 1.0)]
            table.add_row(name, f"{free} of {len(curve) - 1}", *(f"{loss - self.dense:+.4g}" for loss in quarters))
        return table


def removal_order(scores: list[float]) -> tuple[int, ...]:
    return tuple(sorted(range(len(scores)), key=lambda head: (scores[head], head)))


def sensitivity(
    model: nn.Module,
    batches: Iterable[Any],
    scores: HeadScores,
    *,
    loss_fn: LossFunction | None = None,
    progress: Callable[[int], None] | None = None,
) -> Sensitivity:
    """Measures the loss curve of every attention of `model`, heads going in the order of `scores`.

    Uses no compensation, so that a curve is of the heads alone. batches, loss_fn: as for `hp.observe`. progress: called with the
    number of batches done. Raises InvalidInput where `batches` is empty, a site is not reached, or a loss is not finite.
    """
    with own_attention(model):
        sites = [site for site in attention_sites(model) if site.name not in scores.unreached]
        order = {site.name: removal_order(scores[site.name].tolist()) for site in sites}
        masked, samples = MaskedLosses(model, sites, loss_fn), 0
        dense, totals = 0.0, {site.name: torch.zeros(site.head_map.query_heads, dtype=torch.float64) for site in sites}
        for done, batch in enumerate(batches, 1):
            found = masked.on(batch)
            samples, dense = samples + len(found.dense), dense + float(found.dense.sum())
            for name, heads in order.items():
                totals[name] += found.losses({name: removed_one_after_another(heads)}).double().sum(dim=1)
            if progress:
                progress(done)
    if not samples:
        raise InvalidInput("the calibration set is empty; a sensitivity needs at least one batch.")
    curves = {name: (dense / samples, *(total / samples).tolist()) for name, total in totals.items()}
    return Sensitivity(scores.criterion, samples, dense / samples, order, curves)


def removed_one_after_another(heads: tuple[int, ...]) -> torch.Tensor:
    """[heads, heads]: row k has the first k + 1 of `heads` gone."""
    masks = torch.ones(len(heads), len(heads))
    for count, head in enumerate(heads):
        masks[count:, head] = 0.0
    return masks
