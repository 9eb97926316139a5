"""PruningPlan: per site the query heads to keep, with the budget and the scores it came from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text
from torch import nn

from headprune.arguments import check_arguments
from headprune.errors import HeadpruneError, InvalidInput, InvalidPlan
from headprune.files import read_json, write_json
from headprune.head_map import HeadMap
from headprune.models import attention_sites
from headprune.models.gating import checked_keep
from headprune.models.identity import ModelIdentity
from headprune.models.name_cell import NameCell
from headprune.nn.given import plain_module
from headprune.nn.replace import own_attention
from headprune.planning.budget import Budget
from headprune.scoring.scores import HeadScores, model_json
from headprune.scoring.site_shape import SiteShape


@dataclass(frozen=True)
class PruningPlan(Mapping[str, tuple[int, ...]]):
    """Site name -> the query heads to keep, ascending, for every site of one model.

    shapes: the sites' geometry; made_for: the model's kind, sizes and a sample of its weights (None in plans of earlier versions).
    By both a plan for another model is refused. budget, criterion and scores say where the plan came from; None in a plan made by
    hand.
    """

    keep: dict[str, tuple[int, ...]]
    shapes: dict[str, SiteShape]
    budget: Budget | None = None
    criterion: str | None = None
    scores: HeadScores | None = None
    made_for: ModelIdentity | None = None

    def __post_init__(self) -> None:
        check_arguments(PruningPlan, vars(self))
        if set(self.keep) != set(self.shapes):
            raise InvalidPlan(f"a plan must name every site once; it differs at {sorted(set(self.keep) ^ set(self.shapes))[:3]}.")
        checked = {}
        for name, shape in self.shapes.items():
            try:
                checked[name] = shape.head_map.checked(self.keep[name])
            except InvalidInput as error:
                raise InvalidPlan(f"{name}: {error}") from None
        object.__setattr__(self, "keep", checked)
        if checked and not any(checked.values()):
            raise InvalidPlan("the plan removes every head of every site; keep at least one.")

    @classmethod
    def from_keep(cls, model: nn.Module, keep: Mapping[str, Sequence[int]]) -> PruningPlan:
        """A plan by hand: site name -> query heads to keep; sites left out keep all their heads.

        Raises InvalidPlan for a site that the model does not have, a head that does not exist or is named twice.
        """
        model = plain_module(model)
        with own_attention(model):
            sites = {site.name: site for site in attention_sites(model)}
            try:
                given = checked_keep(sites, keep)
            except InvalidInput as error:
                raise InvalidPlan(str(error)) from None
            shapes = {name: SiteShape.of(site) for name, site in sites.items()}
        kept = {name: given.get(name, tuple(range(shapes[name].head_map.query_heads))) for name in sites}
        return cls(kept, shapes, made_for=ModelIdentity.of(model))

    def __getitem__(self, name: str) -> tuple[int, ...]:
        return self.keep[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.keep)

    def __len__(self) -> int:
        return len(self.keep)

    def head_map(self, name: str) -> HeadMap:
        """The head map that the site will have after the cut."""
        return self.shapes[name].head_map.keep(self.keep[name])

    @property
    def removed_heads(self) -> int:
        """Query heads that go, of all sites together."""
        return self.total_heads - sum(len(heads) for heads in self.values())

    @property
    def total_heads(self) -> int:
        """Query heads of the model that the plan was made for."""
        return sum(shape.head_map.query_heads for shape in self.shapes.values())

    @property
    def removed_parameters(self) -> int:
        """Parameters that go with them, of all sites together."""
        return sum(shape.parameters(shape.head_map) - shape.parameters(self.head_map(name)) for name, shape in self.shapes.items())

    def check_fits(self, model: nn.Module) -> None:
        """InvalidPlan unless `model` has exactly the sites, head maps and sizes that the plan was made for, and is of the same
        kind; where only its weights are others the log says so."""
        with own_attention(model):
            found = {site.name: SiteShape.of(site) for site in attention_sites(model)}
        for name in [*self.shapes, *found]:
            if self.shapes.get(name) != found.get(name):
                planned, there = (shapes.get(name) for shapes in (self.shapes, found))
                raise InvalidPlan(
                    f"the plan is for another model: at {name} it expects {describe(planned)}, the model has {describe(there)}."
                )
        if self.made_for is not None:
            self.made_for.check(model)

    def to_json(self) -> dict[str, Any]:
        """What plan.json holds beside its kind and schema version."""
        sites = {name: {"keep": list(self[name]), "shape": self.shapes[name].to_json()} for name in self}
        for name, found in self.scores.to_json().items() if self.scores is not None else ():
            sites[name].update(found)
        budget = None if self.budget is None else self.budget.to_json()
        return {"criterion": self.criterion, "budget": budget, **model_json(self.made_for), "sites": sites}

    def save(self, path: str | Path) -> None:
        """Writes plan.json, through a temporary name; "keep" in it may be edited by hand."""
        write_json(path, "pruning_plan", self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> PruningPlan:
        """Raises InvalidInput where the file is no plan.json, InvalidPlan where it contradicts itself."""
        document = read_json(path, "pruning_plan")
        try:
            sites = document["sites"]
            shapes = {name: SiteShape.from_json(site["shape"]) for name, site in sites.items()}
            budget = None if document["budget"] is None else Budget.of(document["budget"])
            scores, made_for = None, ModelIdentity.from_json(document.get("model"))
            if sites and all("scores" in site for site in sites.values()):
                scores = replace(HeadScores.from_json(document["criterion"], sites), made_for=made_for)
            keep = {name: site["keep"] for name, site in sites.items()}
            return cls(keep, shapes, budget, document["criterion"], scores, made_for)
        except HeadpruneError:
            raise
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise InvalidInput(f"{path} is not a complete pruning_plan file: {error!r}.") from None

    def __str__(self) -> str:
        origin = f" by {self.criterion}, {self.budget}" if self.budget else ""
        rows = (f"  {name}: keep {list(self[name])} ({self.shapes[name].head_map} -> {self.head_map(name)})" for name in self)
        return "\n".join([f"PruningPlan{origin}: {self.removed_heads} of {self.total_heads} query heads go", *rows])

    def __rich__(self) -> Table:
        """Layer by head: a filled square stays, a dot goes."""
        title = f"plan: {self.removed_heads} of {self.total_heads} query heads go, {self.removed_parameters:,} parameters"
        table = Table(title=title, title_justify="left")
        table.add_column("attention")
        table.add_column("■ stays, · goes", overflow="fold")
        table.add_column("before")
        table.add_column("after")
        for name, heads in self.items():
            row = Text()
            for head in range(self.shapes[name].head_map.query_heads):
                row.append("■ " if head in heads else "· ", style="green" if head in heads else "dim")
            table.add_row(NameCell(name), row, str(self.shapes[name].head_map), str(self.head_map(name)))
        return table


def check_plan(plan: PruningPlan, model: nn.Module) -> None:
    """InvalidInput where `plan` is something else, InvalidPlan where it is for another model than `model`."""
    if not isinstance(plan, PruningPlan):
        raise InvalidInput(
            f"the plan is {plan!r:.100}; expected a PruningPlan, as hp.plan, PruningPlan.from_keep(model, {{site: heads}}) and "
            "PruningPlan.load(path) give it."
        )
    plan.check_fits(model)


def describe(shape: SiteShape | None) -> str:
    return "no such site" if shape is None else f"{shape.head_map}, head_dim {shape.head_dim}, hidden size {shape.hidden_size}"
