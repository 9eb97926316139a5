"""The measured table: one row for each method, as plain data, for the terminal and as Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from headprune.evaluation import Interval

NOTHING = "–"
MB = 1e6


@dataclass(frozen=True)
class MethodRow:
    """One method. refused: why there is nothing to measure; all below is then as it stands here.

    parameters, nonzero: of the whole model, distinct ones; nonzero is None for quantised weights. file_bytes: of its safetensors
    file with all zeros in it, None where none can be written. compact_bytes: of the smallest form, which `compact` names.
    flops_share: FLOPs of a forward pass with dense kernels over the dense model's; None where they cannot be counted.
    quality, loss: on test data, and on training batches that no method saw. tuned_...: after the same fine-tune. difference: of
    the headline from the dense model's, on the same examples. latency_share: median time of a forward pass over the dense
    model's, both timed in turn with dense kernels; machine: device, threads and torch that it is of.
    """

    method: str
    label: str
    kind: str
    granularity: str
    library: str
    kernels: str
    note: str = ""
    refused: str | None = None
    parameters: int | None = None
    nonzero: int | None = None
    file_bytes: int | None = None
    compact_bytes: int | None = None
    compact: str = ""
    flops_share: float | None = None
    quality: dict[str, float] = field(default_factory=dict)
    difference: Interval | None = None
    loss: float | None = None
    tuned_quality: dict[str, float] | None = None
    tuned_difference: Interval | None = None
    tuned_loss: float | None = None
    tuned_steps: int | None = None
    latency_p50_ms: float | None = None
    latency_share: float | None = None
    machine: str | None = None

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> MethodRow:
        """Raises TypeError where a field is unknown or missing."""
        intervals = {name: content.get(name) for name in ("difference", "tuned_difference")}
        intervals = {name: None if found is None else Interval(**found) for name, found in intervals.items()}
        return cls(**{**content, **intervals})


@dataclass(frozen=True)
class MethodComparison:
    """All rows of one model on one task. heads: query heads before and after; removed: the parameters that this removes, which
    every method was asked to remove. steps, lr: of the fine-tune."""

    model: str
    task: str
    headline: str
    higher_is_better: bool
    heads: tuple[int, int]
    removed: int
    steps: int
    lr: float | None
    rows: tuple[MethodRow, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def row(self, method: str) -> MethodRow:
        """Raises KeyError where it was not compared."""
        return {row.method: row for row in self.rows}[method]

    def title(self) -> str:
        before, after = self.heads
        machines = " and ".join(dict.fromkeys(row.machine for row in self.rows if row.machine))
        return (
            f"{self.model}, {self.task}. {before - after} of {before} heads are {self.removed:,} parameters; the others remove "
            f"or zero about as many.{f' Latency on {machines}.' if machines else ''}"
        )

    def ratio(self, quality: Mapping[str, float] | None) -> str:
        """Of the headline to the dense model's before any fine-tune."""
        dense = self.row("dense").quality[self.headline]
        return NOTHING if quality is None or not dense else f"{quality[self.headline] / dense:.3f}"

    def quality_columns(self) -> tuple[str, ...]:
        tuned = (f"of dense, after {self.steps} steps", "loss after") if self.steps else ()
        return (f"{self.headline} ({'higher' if self.higher_is_better else 'lower'} is better)", "of dense", "loss", *tuned)

    def quality_cells(self, row: MethodRow) -> tuple[str, ...]:
        if row.refused is not None:
            return (NOTHING,) * len(self.quality_columns())
        tuned = (self.ratio(row.tuned_quality), shown(row.tuned_loss, ".3f")) if self.steps else ()
        return (f"{row.quality[self.headline]:.4f}", self.ratio(row.quality), f"{row.loss:.3f}", *tuned)

    def cost_columns(self) -> tuple[str, ...]:
        ratios = {"FLOPs, of dense": "flops_share", "latency, of dense": "latency_share"}
        measured = (name for name, field in ratios.items() if any(getattr(row, field) is not None for row in self.rows))
        return ("parameters", "not 0", "MB as a file", "MB at the least", *measured, "special kernels")

    def cost_cells(self, row: MethodRow) -> tuple[str, ...]:
        if row.refused is not None:
            return ("not possible", *[NOTHING] * (len(self.cost_columns()) - 1))
        least = row.file_bytes if row.compact_bytes is None else row.compact_bytes
        ratios = {"FLOPs, of dense": shown(row.flops_share, ".3f"), "latency, of dense": shown(row.latency_share, ".2f")}
        sizes = (f"{row.parameters:,}", shown(row.nonzero, ","), megabytes(row.file_bytes), megabytes(least))
        measured = (value for name, value in ratios.items() if name in self.cost_columns())
        return (*sizes, *measured, "needed" if row.kernels else "none")

    def notes(self) -> list[str]:
        """What does not fit into the table, a line for each method."""
        return [f"{row.label} ({row.granularity}): {'; '.join(said_of(row))}" for row in self.rows if row.method != "dense"]

    def __rich__(self) -> RenderableType:
        """Quality and cost in a table each, so that they fit into a terminal, then the notes."""
        halves = {self.quality_columns(): self.quality_cells, self.cost_columns(): self.cost_cells}
        shown = []
        for columns, cells in halves.items():
            table = Table("method", title_justify="left")
            for column in columns:
                table.add_column(column, justify="right")
            for row in self.rows:
                table.add_row(row.label, *cells(row))
            shown.append(table)
        return Group(self.title(), *shown, *(Text(f"- {note}") for note in self.notes()))

    def to_markdown(self) -> str:
        """One table, and a list of notes below it."""
        columns = ("method", *self.cost_columns(), *self.quality_columns())
        rows = [(row.label, *self.cost_cells(row), *self.quality_cells(row)) for row in self.rows]
        rules = ("---", *["---:"] * (len(columns) - 1))
        lines = [f"| {' | '.join(cells)} |" for cells in (columns, rules, *rows)]
        return "\n".join([f"**{self.title()}**", "", *lines, "", *(f"- {note}" for note in self.notes()), ""])


def said_of(row: MethodRow) -> list[str]:
    """The library, what was done or why it could not be, how the least was counted, the differences from dense."""
    if row.refused is not None:
        return [row.library, row.refused]
    least = f"MB at the least {row.compact}" if row.compact else ""
    kernels = f"faster than dense only with {row.kernels}" if row.kernels else ""
    named = {"difference from dense": row.difference, "after the fine-tune": row.tuned_difference}
    return [part for part in (row.library, row.note, least, kernels) if part] + [
        f"{name} {found}" for name, found in named.items() if found is not None
    ]


def shown(value: float | None, form: str) -> str:
    return NOTHING if value is None else format(value, form)


def megabytes(value: int | None) -> str:
    return NOTHING if value is None else f"{value / MB:.2f}"
