"""One step of a schedule: score -> plan -> cut -> recover -> measure, towards a target in the original's cost."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from headprune.planning import PruningPlan, plan
from headprune.schedules.composition import Keep, composed, protected_now, relative_budget, removed_fraction, shapes_of
from headprune.schedules.recovering import Round
from headprune.schedules.result import Step
from headprune.schedules.setting import Setting
from headprune.scoring import HeadScores, get_criterion, score
from headprune.surgery import prune, search_plan


@dataclass
class Clock:
    """Times the stages of one step, shows them, and says in an error which one failed."""

    label: str
    show: Callable[[str, int, int], None] | None
    seconds: dict[str, float] = field(default_factory=dict)
    stage: str = ""

    @contextmanager
    def timed(self, stage: str) -> Iterator[Callable[[int, int], None]]:
        """Gives `progress(done, total)` to the block."""
        self.stage, started = stage, time.perf_counter()
        title = f"{self.label}: {stage}"
        if self.show:
            self.show(title, 0, 1)
        yield lambda done, total: self.show(title, done, total) if self.show else None
        self.seconds[stage] = time.perf_counter() - started
        if self.show:
            self.show(title, 1, 1)


def scored(setting: Setting, model: nn.Module, clock: Clock) -> HeadScores:
    batches = setting.batches if get_criterion(setting.criterion).needs else ()
    with clock.timed("score") as progress:
        return score(
            model,
            batches,
            setting.criterion,
            normalize=setting.normalize,
            loss_fn=setting.loss_fn,
            token_mask=setting.token_mask,
            progress=lambda done: progress(done, len(batches)),
        )


def planned(setting: Setting, model: nn.Module, keep: Keep, target: float, clock: Clock) -> PruningPlan:
    """The plan for `model` as it is, whose heads are `keep` of the original's, from its scores."""
    scores = scored(setting, model, clock)
    original = shapes_of(setting.dense)
    options = dict(setting.planning)
    if "protect" in options:
        options["protect"] = protected_now(options["protect"], keep)
    budget = relative_budget(setting.budget, target, original, scores.shapes)
    if not setting.trials:
        return plan(scores, budget, **options)
    with clock.timed("try plans") as progress:
        return search_plan(
            model,
            scores,
            budget,
            setting.batches,
            forward=setting.forward,
            token_mask=setting.token_mask,
            trials=setting.trials,
            seed=setting.seed,
            progress=progress,
            **options,
        ).plan


def pruned(setting: Setting, model: nn.Module, chosen: PruningPlan, clock: Clock) -> None:
    with clock.timed("prune") as progress:
        calibration = setting.batches if setting.compensate and setting.batches else None
        prune(
            model,
            chosen,
            calibration,
            forward=running(setting),
            token_mask=setting.token_mask,
            feed_forward=setting.feed_forward,
            progress=progress,
        )


def running(setting: Setting) -> Callable[[nn.Module, Any], Any] | None:
    """How a batch is run where the model's outputs are not looked at: as the loss runs it, where it is no dict for the model."""
    plain = all(isinstance(batch, Mapping) for batch in setting.batches)
    return setting.forward or (None if plain else setting.loss_fn)


def recovered(setting: Setting, model: nn.Module, number: int, of: int, work: Path | None, clock: Clock) -> Any:
    """work: the folder of this recovery."""
    if setting.recover is None:
        return None
    with clock.timed("recover") as progress:
        around = Round(number, of, setting.dense, setting.training_data, setting.loss_fn, setting.seed + number, work, progress)
        return setting.recover(model, around)


def measured(setting: Setting, model: nn.Module, clock: Clock) -> float | None:
    with clock.timed("measure"):
        return setting.quality(model)


def described_step(
    setting: Setting, number: int, target: float, keep: Keep, quality: float | None, clock: Clock, **details: Any
) -> Step:
    original = shapes_of(setting.dense)
    removed = removed_fraction(setting.budget, original, keep)
    return Step(number, target, removed, keep, quality, True, clock.seconds, details)


def plan_of(setting: Setting, keep: Keep, name: str | None = None) -> PruningPlan:
    """`keep` as a plan for the original."""
    return PruningPlan(dict(keep), shapes_of(setting.dense), setting.budget, name or setting.criterion)


def carry_out(
    setting: Setting, model: nn.Module, keep: Keep, number: int, target: float, clock: Clock, work: Path | None, of: int
) -> Step:
    """One whole step on `model`, in place; `keep` are the heads of the original that it has."""
    chosen = planned(setting, model, keep, target, clock)
    pruned(setting, model, chosen, clock)
    report = recovered(setting, model, number, of, work, clock)
    quality = measured(setting, model, clock)
    return described_step(setting, number, target, composed(keep, chosen), quality, clock, recovery=summary(report))


def summary(report: Any) -> Any:
    """What a recovery says of itself, as JSON."""
    to_json = getattr(report, "to_json", None)
    return json.loads(json.dumps(to_json())) if to_json else None
