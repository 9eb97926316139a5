"""What a schedule works with, the same at every step."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from headprune.arguments import check_arguments
from headprune.errors import InvalidInput, unknown_name, whole_number
from headprune.models.batches import length_of, several
from headprune.nn.given import plain_module
from headprune.planning import Budget, plan
from headprune.recovery.result import told_apart
from headprune.schedules.composition import shapes_of
from headprune.schedules.quality import has_loss, mean_loss, refuse_not_finite
from headprune.schedules.recovering import Recover, RecoverySettings
from headprune.scoring import HeadScores, Need, check_normalization, get_criterion
from headprune.scoring.batch_identity import checksum, data_identity
from headprune.scoring.observer import LossFunction, observer_of
from headprune.scoring.passes import in_eval_mode
from headprune.scoring.site_shape import SiteShape
from headprune.settings import described

ShowProgress = Callable[[str, int, int], None]
OWN_PLANNING = ("scores", "budget", "sensitivity")  # arguments of hp.plan that a schedule gives, or that fit one model only


@dataclass(frozen=True)
class Setting:
    """The options that all schedules share.

    criterion, normalize: as in `hp.score`. loss_fn: `loss_fn(model, batch)`, per-sample losses or their mean; default the
        model's own. forward, token_mask: as in `hp.prune`; batches that are no dicts run by default as loss_fn runs them.
    compensate: re-solve output projections on the batches at every cut; feed_forward: and the ends of the feed-forwards.
    trials: plans to try at every cut, pruned and compensated (`search_plan`); 0: plan by scores alone.
    recover: RecoverySettings, or `recover(model, round)`, which trains `model` in place; None: no recovery.
    train: the data that recovery trains on; default the calibration batches.
    metric: `metric(model)` gives its quality; default minus the mean loss on the calibration batches, where they have one.
    higher_is_better: of `metric`.
    planning: whatever else `hp.plan` takes: allocation, granularity, min_heads, protect (in the original's heads), ...
    """

    dense: nn.Module
    batches: Sequence[Any]
    budget: Budget
    criterion: str = "fisher"
    normalize: str = "none"
    loss_fn: LossFunction | None = None
    forward: Callable[[nn.Module, Any], Any] | None = None
    token_mask: Callable[[Any], Tensor | None] | None = None
    compensate: bool = True
    feed_forward: bool = False
    trials: int = 0
    recover: Recover | None = None
    train: Any = None
    metric: Callable[[nn.Module], float] | None = None
    higher_is_better: bool = True
    seed: int = 0
    progress: ShowProgress | None = None
    planning: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, dense: nn.Module, batches: Any, budget: Budget, options: Mapping[str, Any]) -> Setting:
        """Raises InvalidInput for an unknown option or criterion, InfeasibleBudget where no plan for `dense` meets the budget."""
        own = {name: value for name, value in options.items() if name in OPTIONS}
        planning = {name: value for name, value in options.items() if name not in OPTIONS}
        for name in planning:
            if name not in PLANNING:
                raise unknown_name("option", name, (*OPTIONS, *PLANNING))
        batches = list(several(batches))
        found = cls(plain_module(dense), batches, budget, **own, planning=planning)
        check_arguments(cls, vars(found))
        check_normalization(found.normalize)
        if Need.MOVEMENT in get_criterion(found.criterion).needs:
            raise InvalidInput(
                f"criterion {found.criterion!r} is recorded while a model is trained, which no schedule does before it scores; "
                "choose another, or pruning_aware(method='movement')."
            )
        whole_number("trials", found.trials, least=0)
        whole_number("seed", found.seed, least=0)
        if found.feed_forward and not found.compensate:
            raise InvalidInput("feed_forward=True is a part of compensation; give compensate=True too, or leave it out.")
        if found.train is not None:
            several(found.train, "train")
        if length_of(found.train) == 0:
            raise InvalidInput("the training data is empty; give at least one batch, or leave train out.")
        if isinstance(found.recover, RecoverySettings):
            found.refuse_untrainable()
        found.refuse_infeasible(shapes_of(found.dense))
        return found

    def with_recovery(self, recover: Recover | None) -> Setting:
        return replace(self, recover=recover)

    def refuse_infeasible(self, shapes: Mapping[str, SiteShape]) -> None:
        """InfeasibleBudget at the start, not after hours: the last target is planned with equal scores."""
        equal = {name: torch.zeros(shape.head_map.query_heads) for name, shape in shapes.items()}
        plan(HeadScores(self.criterion, equal, dict(shapes)), self.budget, **self.planning)

    def refuse_untrainable(self) -> None:
        if self.train is None and not self.batches:
            raise InvalidInput("the training data is empty: there are no calibration batches; give some, or other data as train.")

    def refuse_unscorable(self) -> None:
        """InvalidInput where heads are chosen by batches and there are none."""
        runs = {observer_of(need).runs for need in get_criterion(self.criterion).needs} - {"nothing"}
        if not self.batches and (runs or self.trials):
            reader = f"criterion {self.criterion!r}" if runs else f"trials={self.trials}"
            raise InvalidInput(f"the calibration set is empty, and {reader} runs the model; give at least one batch.")

    @property
    def training_data(self) -> Any:
        return self.batches if self.train is None else self.train

    @torch.no_grad()
    def quality(self, model: nn.Module) -> float | None:
        """Higher is better; None where nothing measures it. Raises InvalidInput where it is not finite."""
        if self.metric is not None:
            with in_eval_mode(model):
                found = float(self.metric(model)) * (1 if self.higher_is_better else -1)
        elif has_loss(self.batches, self.loss_fn):
            found = -mean_loss(model, self.batches, self.loss_fn)
        else:
            found = None
        refuse_not_finite(found)
        return found

    def to_json(self) -> dict[str, Any]:
        """What must be the same for a folder to be taken up; functions count by their names."""
        plain = (
            "criterion", "normalize", "loss_fn", "forward", "token_mask", "compensate", "feed_forward", "trials", "seed",
            "planning", "recover", "metric", "higher_is_better",
        )  # fmt: skip
        content = {name: described(getattr(self, name)) for name in plain}
        shapes = {name: str(shape.head_map) for name, shape in shapes_of(self.dense).items()}
        model = {**told_apart(self.dense), "sites": shapes}
        data = {"batches": data_identity(self.batches), "train": data_identity(self.train)}
        table = {} if self.budget.table is None else {"latency table": checksum(self.budget.table)}
        return {"budget": self.budget.to_json(), **table, "model": model, **data, **content}


OPTIONS = [entry.name for entry in fields(Setting) if entry.name not in ("dense", "batches", "budget", "planning")]
PLANNING = [name for name in inspect.signature(plan).parameters if name not in OWN_PLANNING]


def check_limit(setting: Setting, max_drop: float | None) -> None:
    if max_drop is not None and setting.metric is None and not has_loss(setting.batches, setting.loss_fn):
        raise InvalidInput("max_drop needs a quality: give metric=, loss_fn=, or batches with labels.")
