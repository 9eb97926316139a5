"""HeadScores: one criterion's verdict on every query head."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from rich.text import Text
from torch import Tensor

from headprune.arguments import check_arguments
from headprune.errors import InvalidInput, unknown_name
from headprune.files import read_json, write_json
from headprune.models.identity import ModelIdentity
from headprune.models.name_cell import NameCell
from headprune.scoring.agreement import Agreement, agreement
from headprune.scoring.site_shape import SiteShape


@dataclass(frozen=True)
class HeadScores(Mapping[str, Tensor]):
    """Site name -> fp32 tensor [query_heads], higher = keep; with the criterion's name and each site's geometry.

    spread: site name -> fp32 [query_heads], the bootstrap standard deviation of each score over the calibration samples, where the
    criterion is one of samples. unreached: sites that no calibration data ran through; their scores are NaN, plans keep them.
    made_for: the model that was scored, for the plans to come; None in scores of earlier versions.
    """

    criterion: str
    scores: dict[str, Tensor]
    shapes: dict[str, SiteShape]
    spread: Mapping[str, Tensor] | None = None
    unreached: frozenset[str] = field(default_factory=frozenset)
    made_for: ModelIdentity | None = None

    def __post_init__(self) -> None:
        if list(self.scores) != list(self.shapes):
            raise InvalidInput("scores and shapes must name the same sites in the same order.")
        for name, scores in self.scores.items():
            heads = self.shapes[name].head_map.query_heads
            if tuple(scores.shape) != (heads,):
                raise InvalidInput(f"scores of {name} have shape {list(scores.shape)}; expected [{heads}].")
            if name not in self.unreached and torch.isnan(scores).any():
                heads_with_nan = torch.isnan(scores).nonzero().flatten().tolist()
                raise InvalidInput(
                    f"{self.criterion} scores of {name} are NaN for heads {heads_with_nan}; check the data and the loss, and "
                    "look for NaN in the weights or overflow in low precision."
                )

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.scores:
            raise KeyError(str(unknown_name("attention site", name, self.scores)))
        return self.scores[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.scores)

    def __len__(self) -> int:
        return len(self.scores)

    def compare(self, other: HeadScores, keep: float = 0.5) -> Agreement:
        """How far two rankings of the same heads agree; keep: the fraction of heads whose choice is compared.

        Raises InvalidInput where the sites or head counts differ.
        """
        check_arguments(HeadScores.compare, locals())
        if self.shapes != other.shapes:
            raise InvalidInput(f"{self.criterion} and {other.criterion} score different models: their sites differ.")
        reached = [name for name in self if name not in self.unreached | other.unreached]
        return agreement({name: self[name] for name in reached}, {name: other[name] for name in reached}, keep)

    def to_json(self) -> dict[str, dict[str, Any]]:
        """Site name -> its scores and spread (null: unreached) and shape."""
        sites = {}
        for name in self:
            reached = name not in self.unreached
            sites[name] = {"scores": self[name].tolist() if reached else None, "shape": self.shapes[name].to_json()}
            if self.spread is not None:
                sites[name]["spread"] = self.spread[name].tolist() if reached else None
        return sites

    @classmethod
    def from_json(cls, criterion: str, sites: Mapping[str, Mapping[str, Any]]) -> HeadScores:
        """Raises KeyError or TypeError where something is missing."""
        shapes = {name: SiteShape.from_json(site["shape"]) for name, site in sites.items()}
        unreached = frozenset(name for name, site in sites.items() if site["scores"] is None)
        nothing = {name: [float("nan")] * shapes[name].head_map.query_heads for name in unreached}
        scores = {name: torch.tensor(nothing.get(name, site["scores"]), dtype=torch.float32) for name, site in sites.items()}
        spread = None
        if sites and all("spread" in site for site in sites.values()):
            spread = {name: torch.tensor(nothing.get(name, site["spread"]), dtype=torch.float32) for name, site in sites.items()}
        return cls(criterion, scores, shapes, spread, unreached)

    def save(self, path: str | Path) -> None:
        """Writes scores.json, through a temporary name."""
        write_json(path, "head_scores", {"criterion": self.criterion, **model_json(self.made_for), "sites": self.to_json()})

    @classmethod
    def load(cls, path: str | Path) -> HeadScores:
        """Raises InvalidInput where the file is no scores.json, CorruptCheckpoint where it is of a newer version."""
        document = read_json(path, "head_scores")
        try:
            scores = cls.from_json(document["criterion"], document["sites"])
            return replace(scores, made_for=ModelIdentity.from_json(document.get("model")))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise InvalidInput(f"{path} is not a complete head_scores file: {error!r}.") from None

    def __str__(self) -> str:
        rows = (f"  {name}: {' '.join(f'{score:.3g}' for score in self[name].tolist())}" for name in self)
        return "\n".join([f"HeadScores by {self.criterion} (higher = keep)", *rows])

    def __rich__(self) -> Table:
        """A heat map, layer by head: number and shade are the percentile of the score in the whole model."""
        everything = torch.cat([torch.zeros(0), *(self[name] for name in self if name not in self.unreached)])
        table = Table(title=f"{self.criterion}: percentile of each head in the model (higher = keep)", title_justify="left")
        table.add_column("attention")
        table.add_column("query heads 0, 1, 2 ...", overflow="fold")
        for name in self:
            row = Text("not reached by the data" if name in self.unreached else "")
            for score in () if name in self.unreached else self[name]:
                rank = float((everything < score).float().mean())
                level = int(40 + 215 * rank)
                ink = "black" if rank > 0.5 else "white"
                row.append(f"{100 * rank:3.0f}", style=f"{ink} on rgb({level // 3},{level},{int(level * 0.7)})")
            table.add_row(NameCell(name), row)
        return table


def model_json(made_for: ModelIdentity | None) -> dict[str, Any]:
    """The entry of a file that says which model it is for."""
    return {} if made_for is None else {"model": made_for.to_json()}
