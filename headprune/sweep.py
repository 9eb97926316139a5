"""The quality/cost curve: many budgets from one scoring pass."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from torch import nn

from headprune.errors import InvalidInput
from headprune.evaluation import Evaluation, evaluate
from headprune.evaluation.evaluate import NOTHING
from headprune.evaluation.latency import measure_latency
from headprune.evaluation.tasks import Task
from headprune.files import read_json, write_json
from headprune.planning import Budget, PruningPlan, plan
from headprune.scoring.scores import HeadScores
from headprune.surgery import prune


@dataclass(frozen=True)
class Point:
    """One budget: heads kept at each site, and what the pruned model then is. pareto: no other point is better in both the headline
    metric and the parameters. latency_share: median latency over the dense model's, both timed in turn; None in older files."""

    budget: dict[str, float]
    kept: dict[str, int]
    evaluation: Evaluation
    pareto: bool = False
    latency_share: float | None = None


@dataclass(frozen=True)
class Sweep:
    """The dense model (budget 0) and one point for each budget."""

    task: str
    headline: str
    higher_is_better: bool
    criterion: str
    points: tuple[Point, ...]

    def save(self, path: str | Path) -> None:
        """Writes sweep.json, through a temporary name."""
        write_json(path, "sweep", asdict(self))

    @classmethod
    def load(cls, path: str | Path) -> Sweep:
        """Raises InvalidInput where the file is no sweep.json."""
        document = read_json(path, "sweep")
        try:
            points = tuple(Point(**{**one, "evaluation": Evaluation(**one["evaluation"])}) for one in document["points"])
            named = {name: document[name] for name in ("task", "headline", "higher_is_better", "criterion")}
            return cls(**named, points=points)
        except (KeyError, TypeError) as error:
            raise InvalidInput(f"{path} is not a complete sweep file: {error!r}.") from None

    def __rich__(self) -> Group:
        title, machine = f"{self.task}, heads by {self.criterion} (* on the Pareto front)", self.points[0].evaluation.machine
        table = Table(title=title, title_justify="left", caption=machine, caption_justify="left")
        for column in ("budget", self.headline, "of\ndense", "parameters", "latency\np50, ms", "of\ndense"):
            table.add_column(column, no_wrap=True)
        layers = Table("budget", "heads kept by layer")  # which in many layers take the width of a terminal
        dense = self.points[0].evaluation.quality[self.headline]
        for point in self.points:
            found, budget = point.evaluation, " ".join(f"{name}={value:g}" for name, value in point.budget.items())
            ratio = f"{found.quality[self.headline] / dense:.3f}" if dense else NOTHING
            table.add_row(
                f"{budget}{' *' if point.pareto else ''}", f"{found.quality[self.headline]:.4f}", ratio,
                f"{found.parameters:,}", f"{found.latency_p50_ms:.1f}",
                "" if point.latency_share is None else f"{point.latency_share:.3f}",
            )  # fmt: skip
            layers.add_row(budget, " ".join(map(str, point.kept.values())))
        return Group(table, layers)


def sweep(
    model: nn.Module,
    task: Task,
    scores: HeadScores,
    budgets: Sequence[Budget],
    *,
    compensate: bool = True,
    repeats: int = 10,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> Sweep:
    """Prunes copies of `model` to every budget and evaluates each on `task`; the model itself stays dense.

    compensate: re-solve output projections on the task's calibration data. repeats: timed forward passes. options: of `hp.plan`
    (allocation, granularity, min_heads, ...). Raises InfeasibleBudget before anything is measured where a budget cannot be met.
    """
    if not budgets:
        raise InvalidInput("a sweep needs at least one budget, for example Budget(heads=0.5).")
    plans = [plan(scores, budget, **options) for budget in budgets]
    dense = evaluate(model, task, repeats=repeats)
    points = [Point({budgets[0].quantity: 0.0}, heads_of(plans[0], dense=True), dense, latency_share=1.0)]
    for done, (budget, chosen) in enumerate(zip(budgets, plans), 1):
        pruned = copy.deepcopy(model)
        prune(pruned, chosen, task.calibration if compensate else None, forward=task.forward)
        found = evaluate(pruned, task, repeats=repeats)
        # In turn, as the machine may not be what it was when the dense model was timed.
        timed = measure_latency({"dense": model, "pruned": pruned}, task.latency_inputs(), repeats)
        share = timed["pruned"].p50_ms / timed["dense"].p50_ms
        points.append(Point(budget.to_json(), heads_of(chosen), found, latency_share=share))
        if progress:
            progress(done, len(plans))
    return Sweep(task.name, task.headline, task.higher_is_better, scores.criterion, with_pareto(points, task))


def heads_of(chosen: PruningPlan, dense: bool = False) -> dict[str, int]:
    return {name: chosen.shapes[name].head_map.query_heads if dense else len(heads) for name, heads in chosen.items()}


def with_pareto(points: Sequence[Point], task: Task) -> tuple[Point, ...]:
    sign = 1 if task.higher_is_better else -1
    values = [(sign * point.evaluation.quality[task.headline], -point.evaluation.parameters) for point in points]
    dominated = [any(b[0] >= a[0] and b[1] >= a[1] and b != a for b in values) for a in values]
    return tuple(replace(one, pareto=not beaten) for one, beaten in zip(points, dominated))
