"""The plans of a whole range of budgets, as the planner makes them: what the report's slider moves over."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any

from headprune.errors import HeadpruneError, InfeasibleBudget
from headprune.planning import Budget, plan
from headprune.report.run_folder import RunFolder
from headprune.scoring import HeadScores

FEW, STEPS = 144, 40  # a model of few heads gets a step for each, others this many
Keep = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class BudgetSteps:
    """fraction of `quantity` to remove -> the heads that the plan for it keeps, ascending. note: what differs from the run."""

    quantity: str
    allocation: str
    steps: dict[float, Keep]
    note: str = ""


def budget_steps(run: RunFolder) -> BudgetSteps:
    """Plans for 0, 1, 2, ... heads (or parts of another quantity) away, by the run's scores and planning options.

    The run's own plan stands at its own budget, however it was found. Where the run's options cannot be repeated from the folder
    (a latency budget), the steps are of heads in one ranking, and `note` says so.
    """
    if run.ranking is None:
        return BudgetSteps("heads", "none", own_step(run, "heads"), "The plan holds no scores, so there is no order of heads.")
    quantity = run.plan.budget.quantity if run.plan is not None and run.plan.budget is not None else "heads"
    try:
        return planned_steps(run, run.ranking, quantity, planning_options(run))
    except HeadpruneError as error:
        note = f"The slider ranks all heads together, since the run's own planning cannot be repeated here: {error}"
        return replace(planned_steps(run, run.ranking, "heads", {"min_heads": 0}), note=note)


def planned_steps(run: RunFolder, ranking: HeadScores, quantity: str, options: dict[str, Any]) -> BudgetSteps:
    """Raises the planner's errors, but for budgets beyond what can be met: there the steps end."""
    scores = replace(ranking, spread=None)  # no warning about unsettled heads from every step
    length = (run.plan.budget.sequence_length if run.plan is not None and run.plan.budget is not None else None) or 512
    found: dict[float, Keep] = {}
    for fraction in fractions(run):
        try:
            chosen = plan(scores, Budget.of({quantity: fraction, "sequence_length": length}), **options)
        except InfeasibleBudget:
            break
        found[fraction] = chosen.keep
    steps = [*found.items(), *own_step(run, quantity).items()]
    near = {round(fraction, 6): (fraction, keep) for fraction, keep in steps}  # rounded itself, it would be another plan's budget
    return BudgetSteps(quantity, options.get("allocation", "global"), dict(sorted(near.values())))


def fractions(run: RunFolder) -> list[float]:
    """One for every head where they are few, and those that the sweep measured."""
    heads = sum(shape.head_map.query_heads for shape in run.shapes.values())
    count = heads if heads <= FEW else STEPS
    evenly = (step / count for step in range(count))
    swept = (next(iter(point["budget"].values())) for point in (run.sweep or {}).get("points", ()))
    return distinct([*evenly, *swept])


def distinct(values: Iterable[float]) -> list[float]:
    """Ascending; of those that differ by less than 1e-6, one."""
    return sorted({round(value, 6): value for value in values}.values())


def own_step(run: RunFolder, quantity: str) -> dict[float, Keep]:
    """The run's plan at its budget, or (in another quantity) at the share of heads that it removes."""
    if run.plan is None:
        return {}
    budget = run.plan.budget
    of_heads = run.plan.removed_heads / run.plan.total_heads
    return {budget.fraction if budget is not None and budget.quantity == quantity else of_heads: run.plan.keep}


def planning_options(run: RunFolder) -> dict[str, Any]:
    """What the recipe says about planning, as far as `hp.plan` takes it."""
    section = run.recipe.get("plan") or {}
    known = set(signature(plan).parameters) - {"scores", "budget", "sensitivity"}  # a run's curves are for its report alone
    return {name: value for name, value in section.items() if name in known}
