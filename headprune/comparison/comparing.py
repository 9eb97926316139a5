"""Every method on the same model, data and number of parameters, one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from headprune.arguments import check_arguments
from headprune.comparison.bench import Bench, Progress, Texts
from headprune.comparison.method import Subject, chosen_methods
from headprune.comparison.record import ComparisonFolder
from headprune.comparison.row import MethodComparison
from headprune.errors import InvalidInput, whole_number
from headprune.evaluation.tasks import Task
from headprune.planning import Budget, PruningPlan
from headprune.planning import plan as plan_by_scores
from headprune.recovery.budget import TrainingBudget
from headprune.recovery.methods import get_method
from headprune.recovery.result import told_apart
from headprune.scoring import get_criterion, score
from headprune.scoring.batch_identity import checksum, data_identity
from headprune.surgery import prune, search_plan


def compare_methods(
    model: nn.Module,
    task: Task,
    *,
    heads: float = 0.5,
    plan: PruningPlan | None = None,
    methods: Sequence[str] | None = None,
    criterion: str = "fisher",
    trials: int = 10,
    feed_forward: bool = False,
    steps: int = 50,
    lr: float | None = None,
    repeats: int = 10,
    seed: int = 0,
    folder: str | Path | None = None,
    progress: Progress | None = None,
) -> MethodComparison:
    """Head pruning against other ways to make `model` smaller, each measured on it; `model` itself stays as it is.

    Heads are pruned first; the parameters that go with them are what every other method is to remove or to zero, wherever in the
    model it likes. Then all are fine-tuned alike on the task's loss. Texts: the last training batches, up to 16, are kept for
    losses; the others are for calibration (as many as the task's own) and for the fine-tune; quality is of the test data.

    Args:
        heads: fraction of the query heads to remove. plan: the heads to keep, in place of heads, criterion and trials.
        methods: names out of `comparison_methods()`; default all. The dense model is always there.
        criterion, trials, feed_forward: of head pruning, as in `hp.score`, `hp.search_plan` (0: by scores alone) and `hp.prune`.
        steps, lr: of the fine-tune (`hp.recover`, all weights); 0 steps: none.
        repeats: timed forward passes, dense and compressed in turn; 0: none.
        folder: keeps each row as it is measured; where a killed comparison with the same arguments left some, it goes on.

    Raises InvalidInput for an unknown method, a fraction outside (0, 1) or a folder of another comparison; InvalidPlan,
    UnsupportedModel where heads cannot be pruned. A method that cannot take the model has a row that says why.
    """
    check_arguments(compare_methods, locals())
    chosen = chosen_methods(None if methods is None else ["dense", *methods])
    get_criterion(criterion)
    if plan is not None:
        plan.check_fits(model)
    elif not 0 < heads < 1:
        raise InvalidInput(f"heads is {heads}; expected the fraction of the query heads to remove, above 0 and below 1.")
    for name, number in (("steps", steps), ("repeats", repeats), ("trials", trials)):
        whole_number(name, number, least=0)
    TrainingBudget.of(steps or None, None, None, get_method("full").lr if lr is None else lr, 1)
    texts = Texts.of(task)
    settings = {
        "task": task.name, "data": [data_identity(list(part)) for part in (texts.train, texts.held_out, texts.calibration)],
        "test data and options": checksum({name: value for name, value in vars(task).items() if not name.startswith("_")}),
        "heads": None if plan else heads, "plan": None if plan is None else dict(plan), "criterion": criterion, "trials": trials,
        "feed_forward": feed_forward, "steps": steps, "lr": lr, "repeats": repeats, "seed": seed, **told_apart(model),
    }  # fmt: skip
    kept = ComparisonFolder(folder, settings)
    chosen_plan = kept.earlier or plan or heads_plan(model, task, texts.calibration, heads, criterion, trials, seed)
    savings = prune(model, chosen_plan, dry_run=True).savings
    removed = savings.parameters[0] - savings.parameters[1]
    if not removed:
        raise InvalidInput("the plan removes no parameter, so that there is nothing to compare; remove more heads.")
    kept.start(chosen_plan)
    subject = Subject(model, task, chosen_plan, removed, texts.calibration, feed_forward)
    bench = Bench(subject, texts, steps, lr, repeats, seed, kept)
    rows = []
    for done, method in enumerate(chosen):
        report = progress and partial(within, progress, (steps + 1) * done, (steps + 1) * len(chosen))
        rows.append(kept.row(method.name) or bench.measured(method, report))
        if progress:
            progress((steps + 1) * (done + 1), (steps + 1) * len(chosen))
    return MethodComparison(
        type(model).__name__, task.name, task.headline, task.higher_is_better, savings.query_heads, removed, steps, lr, tuple(rows)
    )


def heads_plan(
    model: nn.Module, task: Task, calibration: Sequence[Any], heads: float, criterion: str, trials: int, seed: int
) -> PruningPlan:
    scores, budget = score(model, calibration, criterion, loss_fn=task.loss), Budget(heads=heads)
    if not trials:
        return plan_by_scores(scores, budget)
    return search_plan(model, scores, budget, calibration, trials=trials, forward=task.readout, seed=seed).plan


def within(progress: Progress, before: int, all_steps: int, step: int, _of: int) -> None:
    """Tells how far one method is as a part of all of them."""
    progress(before + step, all_steps)
