"""HeadScores: one criterion's verdict on every query head, and how it is computed from observations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from headprune.errors import InvalidInput, unknown_name
from headprune.files import read_json, write_json
from headprune.models.tokens import TokenMask
from headprune.scoring.criterion import Criterion, get_criterion
from headprune.scoring.observations import Observations, SiteShape
from headprune.scoring.observe import LossFunction, observe

NORMALIZATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda scores: scores,
    "layer_l2": lambda scores: scores / scores.norm().clamp(min=torch.finfo(torch.float32).tiny),
    "layer_sum": lambda scores: scores / scores.abs().sum().clamp(min=torch.finfo(torch.float32).tiny),
}


@dataclass(frozen=True)
class HeadScores(Mapping[str, Tensor]):
    """Site name -> fp32 tensor [query_heads], higher = keep; with the criterion's name and each site's geometry."""

    criterion: str
    scores: dict[str, Tensor]
    shapes: dict[str, SiteShape]

    def __post_init__(self) -> None:
        if list(self.scores) != list(self.shapes):
            raise InvalidInput("scores and shapes must name the same sites in the same order.")
        for name, scores in self.scores.items():
            heads = self.shapes[name].head_map.query_heads
            if tuple(scores.shape) != (heads,):
                raise InvalidInput(f"scores of {name} have shape {list(scores.shape)}; expected [{heads}].")
            if torch.isnan(scores).any():
                heads_with_nan = torch.isnan(scores).nonzero().flatten().tolist()
                raise InvalidInput(
                    f"{self.criterion} scores of {name} are NaN for heads {heads_with_nan}; check the data and the loss."
                )

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.scores:
            raise KeyError(str(unknown_name("attention site", name, self.scores)))
        return self.scores[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.scores)

    def __len__(self) -> int:
        return len(self.scores)

    def save(self, path: str | Path) -> None:
        """Writes scores.json, through a temporary name."""
        sites = {name: {"scores": self[name].tolist(), "shape": self.shapes[name].to_json()} for name in self}
        write_json(path, "head_scores", {"criterion": self.criterion, "sites": sites})

    @classmethod
    def load(cls, path: str | Path) -> HeadScores:
        """Raises InvalidInput where the file is no scores.json, CorruptCheckpoint where it is of a newer version."""
        document = read_json(path, "head_scores")
        try:
            return cls(
                document["criterion"],
                {name: torch.tensor(site["scores"], dtype=torch.float32) for name, site in document["sites"].items()},
                {name: SiteShape.from_json(site["shape"]) for name, site in document["sites"].items()},
            )
        except (KeyError, TypeError) as error:
            raise InvalidInput(f"{path} is not a complete head_scores file: {error!r}.") from None

    def __str__(self) -> str:
        rows = (f"  {name}: {' '.join(f'{score:.3g}' for score in self[name].tolist())}" for name in self)
        return "\n".join([f"HeadScores by {self.criterion} (higher = keep)", *rows])

    def __rich__(self) -> Table:
        """A heat map, layer by head: number and shade are the percentile of the score in the whole model."""
        everything = torch.cat([self[name] for name in self]) if len(self) else torch.zeros(0)
        table = Table(title=f"{self.criterion}: percentile of each head in the model (higher = keep)", title_justify="left")
        table.add_column("attention", overflow="fold")
        table.add_column("query heads 0, 1, 2 ...", overflow="fold")
        for name in self:
            row = Text()
            for score in self[name]:
                rank = float((everything < score).float().mean())
                level = int(40 + 215 * rank)
                ink = "black" if rank > 0.5 else "white"
                row.append(f"{100 * rank:3.0f}", style=f"{ink} on rgb({level // 3},{level},{int(level * 0.7)})")
            table.add_row(name, row)
        return table


def score_observations(observed: Observations, criterion: str, normalize: str = "none") -> HeadScores:
    """The scores that `criterion` gives to what was observed.

    normalize: "none", "layer_l2" (Michel et al. divide each layer's scores by their L2 norm) or "layer_sum".
    Raises InvalidInput for an unknown name, or where the criterion needs what was not observed.
    """
    chosen = get_criterion(criterion)
    if normalize not in NORMALIZATIONS:
        raise unknown_name("normalization", normalize, NORMALIZATIONS)
    check_observed(observed, chosen)
    scores = {name: NORMALIZATIONS[normalize](chosen.function(site).float()) for name, site in observed.items()}
    label = criterion if normalize == "none" else f"{criterion}/{normalize}"
    return HeadScores(label, scores, {name: site.shape for name, site in observed.items()})


def check_observed(observed: Observations, chosen: Criterion) -> None:
    measured = {"weights": "weight_l1", "gate_gradient": "gate_gradient", "gram": "input_gram"}
    for need in chosen.needs:
        missing = [name for name, site in observed.items() if getattr(site, measured[need.value]) is None]
        if missing:
            raise InvalidInput(
                f"{chosen.name} needs {need.value}, which was not observed at {missing[0]}; observe with needs={{{need}}}."
            )


def score(
    model: nn.Module,
    batches: Any = (),
    criterion: str | Sequence[str] = "fisher",
    *,
    normalize: str = "none",
    loss_fn: LossFunction | None = None,
    token_mask: TokenMask | None = None,
    progress: Callable[[int], None] | None = None,
) -> HeadScores | dict[str, HeadScores]:
    """Scores every query head of `model` on `batches`; see `observe` for all but criterion and normalize.

    criterion: one name, or a list of names: everything is measured in one pass and a dict of HeadScores comes back.
    Raises InvalidInput for an unknown criterion, an empty calibration set, a loss that is missing or not finite.
    """
    names = [criterion] if isinstance(criterion, str) else list(criterion)
    needs = frozenset().union(*(get_criterion(name).needs for name in names))
    observed = observe(model, batches, needs, loss_fn=loss_fn, token_mask=token_mask, progress=progress)
    scores = {name: score_observations(observed, name, normalize) for name in names}
    return scores[criterion] if isinstance(criterion, str) else scores
