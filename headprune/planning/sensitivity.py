"""Which layers tolerate pruning: the loss with 1, 2, 3, ... heads of one attention gone, and with each head alone gone."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import nn

from headprune.arguments import check_arguments
from headprune.errors import InvalidInput
from headprune.files import read_json, write_json, write_text
from headprune.models import attention_sites
from headprune.models.batches import several
from headprune.models.name_cell import NameCell
from headprune.nn.given import plain_module
from headprune.nn.replace import own_attention
from headprune.scoring.masked_losses import MaskedLosses
from headprune.scoring.observer import LossFunction
from headprune.scoring.scores import HeadScores


@dataclass(frozen=True)
class Sensitivity:
    """dense: mean loss with all heads. order: site -> heads, first to go first. curves: site -> mean loss over `samples` samples
    with the first 0, 1, 2, ... heads of that order gone, all else whole. heads: site -> mean loss with each head alone gone."""

    criterion: str
    samples: int
    dense: float
    order: dict[str, tuple[int, ...]]
    curves: dict[str, tuple[float, ...]]
    heads: dict[str, tuple[float, ...]] = field(default_factory=dict)

    def costs(self, scores: HeadScores) -> dict[str, tuple[float, ...]]:
        """Site -> loss increase with 0, 1, 2, ... heads gone; never falling, as a dip is noise that a plan would chase. A site
        that no data reached, where nothing goes, has none.

        Raises InvalidInput where the curves are of another ranking than `scores`.
        """
        for name, found in scores.items():
            if name in scores.unreached:
                continue
            if self.order.get(name) != removal_order(found.tolist()):
                raise InvalidInput(f"the sensitivity is of another order of heads at {name}; measure it with these scores.")
        rises = {name: tuple(accumulate((loss - self.dense for loss in curve), max)) for name, curve in self.curves.items()}
        return rises | dict.fromkeys(scores.unreached, (0.0,))

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
            heads = {name: tuple(losses) for name, losses in document.get("heads", {}).items()}
            return cls(document["criterion"], document["samples"], document["dense"], order, curves, heads)
        except (KeyError, TypeError, AttributeError) as error:
            raise InvalidInput(f"{path} is not a complete sensitivity file: {error!r}.") from None

    def points(self) -> list[dict[str, Any]]:
        """The data of a plot, one dict a point: curve "layer" (heads_gone heads are gone, `head` the last of them) or "head" (that
        head alone is gone), with the loss and by how much it exceeds that of the dense model."""
        found = []
        for site, curve in self.curves.items():
            gone = [None, *self.order[site]]
            rows = [("layer", count, gone[count], loss) for count, loss in enumerate(curve)]
            rows += [("head", 1, head, loss) for head, loss in enumerate(self.heads.get(site, ()))]
            columns = ("curve", "heads_gone", "head", "loss")
            found += [{"site": site, **dict(zip(columns, row)), "increase": row[-1] - self.dense} for row in rows]
        return found

    def save_csv(self, path: str | Path) -> None:
        """Writes `points` as a table with a header, through a temporary name."""
        text, points = io.StringIO(), self.points()
        writer = csv.DictWriter(text, list(points[0]) if points else ["site"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(points)
        write_text(path, text.getvalue())

    def __rich__(self) -> Table:
        """Per attention: how many heads may go for little, the loss at quarters of its heads, its least and most needed one."""
        table = Table(title=f"loss with heads gone, by {self.criterion}; dense {self.dense:.4g}", title_justify="left")
        table.add_column("attention")
        for column in ("free\nheads", "25 %", "50 %", "75 %", "all", "least and\nmost needed"):
            table.add_column(column, no_wrap=True)
        for name, curve in self.curves.items():
            free = sum(1 for loss in curve[1:] if loss <= self.dense + 0.01 * abs(self.dense))
            quarters = [curve[round(share * (len(curve) - 1))] for share in (0.25, 0.5, 0.75, 1.0)]
            increases = (f"{loss - self.dense:+.2g}" for loss in quarters)
            table.add_row(NameCell(name), f"{free}/{len(curve) - 1}", *increases, self.extremes(name))
        return table

    def extremes(self, name: str) -> str:
        ranked = sorted((loss - self.dense, head) for head, loss in enumerate(self.heads.get(name, ())))
        return "\n".join(f"{head}: {increase:+.2g}" for increase, head in (ranked[:1] + ranked[-1:]))


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
    """Measures the loss curve of every attention of `model`, heads going in the order of `scores`, and each head by itself.

    Uses no compensation, so that a curve is of the heads alone. batches, loss_fn: as for `hp.observe`. progress: called with the
    number of batches done. Raises InvalidInput where `batches` is empty, a site is not reached, or a loss is not finite.
    """
    check_arguments(sensitivity, locals())
    model = plain_module(model)
    with own_attention(model):
        sites = [site for site in attention_sites(model) if site.name not in scores.unreached]
        order = {site.name: removal_order(scores[site.name].tolist()) for site in sites}
        masked, samples = MaskedLosses(model, sites, loss_fn), 0
        dense, totals = 0.0, {site.name: torch.zeros(2 * site.head_map.query_heads, dtype=torch.float64) for site in sites}
        for done, batch in enumerate(several(batches), 1):
            found = masked.on(batch)
            samples, dense = samples + len(found.dense), dense + float(found.dense.sum())
            for name, heads in order.items():
                totals[name] += found.losses({name: ablations(heads)}).double().sum(dim=1)
            if progress:
                progress(done)
    if not samples:
        raise InvalidInput("the calibration set is empty; a sensitivity needs at least one batch.")
    means = {name: (total / samples).tolist() for name, total in totals.items()}
    curves = {name: (dense / samples, *losses[: len(losses) // 2]) for name, losses in means.items()}
    singly = {name: tuple(losses[len(losses) // 2 :]) for name, losses in means.items()}
    return Sensitivity(scores.criterion, samples, dense / samples, order, curves, singly)


def ablations(heads: tuple[int, ...]) -> torch.Tensor:
    """[2 * heads, heads]: row k has the first k + 1 of `heads` gone; then row h has head h alone gone."""
    masks = torch.ones(len(heads), len(heads))
    for count, head in enumerate(heads):
        masks[count:, head] = 0.0
    return torch.cat([masks, 1.0 - torch.eye(len(heads))])
