"""Lottery tickets: train, prune a share of what is left, go back to early weights, train again (Frankle & Carbin 2019)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from headprune.arguments import check_arguments
from headprune.errors import InvalidInput, unknown_name, whole_number
from headprune.planning import Budget
from headprune.recovery.result import told_apart
from headprune.recovery.rewind import Source
from headprune.schedules.composition import composed, whole
from headprune.schedules.fresh_weights import Initialise, with_fresh_weights
from headprune.schedules.record import Record, framed, loaded, stored
from headprune.schedules.recovering import Recover
from headprune.schedules.result import ScheduleResult
from headprune.schedules.rewound import EarlyWeights, check_rewindable, earlier_model, keeping_step, repeated_from
from headprune.schedules.schedule import failing, finished, measure_dense, schedule
from headprune.schedules.setting import Setting
from headprune.schedules.spacing import check_spread, targets
from headprune.schedules.step import Clock, described_step, measured, plan_of, planned, pruned, recovered, summary

NAME = "lottery_ticket"
REWINDS = ("weights", "learning_rate")


def check_lottery_ticket(
    recover: Recover | None,
    steps: int | None,
    per_step: float | None,
    spacing: str,
    rewind: str,
    rewind_step: int,
    early: Source | None,
) -> None:
    if recover is None:
        raise InvalidInput(
            "a lottery ticket is trained again after each cut; give recover=RecoverySettings(steps=...) or a function."
        )
    check_spread(steps, per_step, spacing)
    check_rewind(recover, rewind, rewind_step, early)


def check_rewind(recover: Recover, rewind: str, rewind_step: int, early: Source | None) -> None:
    whole_number("rewind_step", rewind_step, least=0)
    if rewind not in REWINDS:
        raise unknown_name("rewind", rewind, REWINDS)
    if early is not None and rewind_step:
        raise InvalidInput(f"early and rewind_step={rewind_step} both say where to go back to; give one of them.")
    if rewind_step:
        settings = check_rewindable(recover, rewind_step)
        if rewind == "weights" and settings.method == "lora":
            raise InvalidInput(
                f"rewind_step={rewind_step} goes back to the weights of that step, and method='lora' trains adapters beside them; "
                "give early=, rewind='learning_rate' or another method."
            )


@schedule(NAME, check_lottery_ticket)
def lottery_ticket(
    model: nn.Module,
    batches: Any,
    budget: Budget,
    *,
    recover: Recover | None,
    steps: int | None = None,
    per_step: float | None = None,
    spacing: str = "geometric",
    rewind: str = "weights",
    rewind_step: int = 0,
    early: Source | None = None,
    control: bool = False,
    initialise: Initialise | None = None,
    folder: str | Path | None = None,
    **options: Any,
) -> ScheduleResult:
    """Looks for a subnetwork that trains as well as the whole from the same early weights.

    Args:
        model: with the weights that training starts from; with `early` the trained model.
        recover: the training (required): RecoverySettings or a function. Step 0 trains the whole model with it.
        steps, per_step, spacing: as in `iterative`; by default 4 steps that take the same share of what is left.
        rewind: "weights" (back to those of `rewind_step`) or "learning_rate" (Renda et al. 2020: the weights stay, the rates from
            `rewind_step` on are repeated).
        rewind_step: the step of the training to go back to; 0 are the weights of `model`. Later steps repeat the rest of it.
        early: an earlier checkpoint of the trained `model` to go back to: a module, a folder or a state_dict.
        control: in the end also train the same heads from fresh random weights; `extras["control"]` is that model,
            `extras["control_quality"]` its quality. initialise: draws them in place; default as the model's class does.
        criterion (in options): default "magnitude_l2". compensate: default False.

    The rest is as in `one_shot`.
    """
    check_arguments(lottery_ticket, locals())
    check_lottery_ticket(recover, steps, per_step, spacing, rewind, rewind_step, early)
    options = {"criterion": "magnitude_l2", "compensate": False, **options}
    setting = Setting.of(model, batches, budget, {**options, "recover": recover})
    setting.refuse_unscorable()
    goals = targets(budget.fraction, steps, per_step, spacing)
    own = {"targets": goals, "rewind": rewind, "rewind_step": rewind_step, "early": named(early), "control": control}
    record = Record(setting.dense, folder, NAME, {**setting.to_json(), **own})
    first = first_weights(setting, record, rewind_step, early, len(goals))
    again = setting.with_recovery(repeated_from(recover, rewind_step))
    trained = record.restore()
    for number in range(record.steps[-1].number + 1, len(goals) + 1):
        clock = Clock(f"step {number} of {len(goals)}", setting.progress)
        with failing(setting, record, NAME, clock):
            chosen = planned(setting, trained, record.present.keep, goals[number - 1], clock)
            keep = composed(record.present.keep, chosen)
            if rewind == "weights":
                trained = framed(first(), keep)
            else:
                pruned(setting, trained, chosen, clock)
            report = recovered(again, trained, number, len(goals), record.recovery_folder(number), clock)
            quality = measured(setting, trained, clock)
        step = described_step(setting, number, goals[number - 1], keep, quality, clock, recovery=summary(report))
        record.accept(step, trained, plan_of(setting, keep))
    extras = controlled(setting, record, initialise) if control else {}
    return finished(setting, record, NAME, trained, **extras)


def named(early: Source | None) -> Any:
    """What the settings say of it."""
    return None if early is None else str(early) if isinstance(early, (str, Path)) else told_apart(early)


def first_weights(setting: Setting, record: Record, rewind_step: int, early: Source | None, rounds: int) -> Callable[[], nn.Module]:
    """Step 0, unless it is done: the whole model trained. Gives the whole model with the weights to go back to. rounds: how many
    follow."""
    dense, weights = setting.dense, EarlyWeights(setting.dense, record.folder)
    if early is not None:
        found = earlier_model(dense, early)
        measure_dense(setting, record, NAME)
        return lambda: found
    if not record.steps:
        clock = Clock("step 0", setting.progress)
        with failing(setting, record, NAME, clock):
            model, training = record.restore(), setting
            if rewind_step:
                training = setting.with_recovery(keeping_step(setting.recover, rewind_step, weights.keep))
            report = recovered(training, model, 0, rounds, record.recovery_folder(0), clock)
            quality = measured(setting, model, clock)
        keep = whole(record.shapes)
        step = described_step(setting, 0, 0.0, keep, quality, clock, recovery=summary(report))
        record.accept(step, model, plan_of(setting, keep))
    return weights.model if rewind_step else lambda: dense


def controlled(setting: Setting, record: Record, initialise: Initialise | None) -> dict[str, Any]:
    """The same heads from fresh weights, trained as long as the last ticket."""
    keep, place = record.present.keep, None if record.folder is None else record.folder / "control.safetensors"
    if place is not None and place.exists():
        return {"control": loaded(setting.dense, keep, place), "control_quality": record.present.details["control_quality"]}
    clock = Clock("control", setting.progress)
    with failing(setting, record, NAME, clock):
        model = framed(with_fresh_weights(setting.dense, setting.seed + 1, initialise), keep)
        number = record.present.number + 1
        recovered(setting, model, number, number, record.recovery_folder(number), clock)
        quality = measured(setting, model, clock)
    record.note(control_quality=quality)
    if place is not None:
        stored(model, place)
        record.forget_recovery(number)
    return {"control": model, "control_quality": quality}
