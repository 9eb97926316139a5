"""Pruning-aware training: gates on the heads are trained with the model, then surgery makes them real."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from headprune.arguments import check_arguments
from headprune.errors import InvalidInput, whole_number
from headprune.models.gating import sites_by_name
from headprune.nn.replace import own_attention, replace_multihead_attention
from headprune.planning import Budget, plan
from headprune.planning.planner import granularity_for, protected_heads
from headprune.recovery import Distillation, Objective
from headprune.schedules.composition import shapes_of
from headprune.schedules.gate_training import GateTrainer, GateTraining
from headprune.schedules.gates import GateLayout, get_gate_method
from headprune.schedules.gates.reach import column_norms
from headprune.schedules.record import Record
from headprune.schedules.result import ScheduleResult
from headprune.schedules.schedule import failing, finished, measure_dense, schedule
from headprune.schedules.setting import Setting
from headprune.schedules.step import Clock, described_step, measured, plan_of, pruned, recovered, summary
from headprune.scoring import HeadScores
from headprune.settings import described
from headprune.surgery import fold_gates

NAME = "pruning_aware"


def check_training(
    method: str, steps: int, lr: float, gate_lr: float | None, weight_decay: float, ramp: float, warm_up: float
) -> None:
    get_gate_method(method)
    whole_number("steps", steps)
    if lr < 0 or weight_decay < 0 or not 0 <= ramp <= 1 or not 0 <= warm_up <= 1:
        raise InvalidInput(
            f"lr={lr}, weight_decay={weight_decay}, ramp={ramp}, warm_up={warm_up}: expected a rate and a decay of 0 or more, and "
            "shares between 0 and 1."
        )
    if gate_lr is not None and not gate_lr > 0:
        raise InvalidInput(f"gate_lr is {gate_lr}; expected the gates' learning rate, above 0, or None.")


@schedule(NAME, check_training)
def pruning_aware(
    model: nn.Module,
    batches: Any,
    budget: Budget,
    *,
    method: str = "hard_concrete",
    steps: int = 300,
    lr: float = 3e-5,
    gate_lr: float | None = None,
    weight_decay: float = 0.0,
    ramp: float = 0.6,
    warm_up: float = 0.1,
    dropout: bool = True,
    teacher: bool = False,
    distil: Distillation | None = None,
    folder: str | Path | None = None,
    **options: Any,
) -> ScheduleResult:
    """Trains the model with gates on its heads until as many are closed as the budget asks, then cuts the closed ones out.

    The gates go through our attention operator where the model runs it (transformers models are switched to it for the while),
    so that closed heads are not computed; elsewhere they are multiplied in before the output projection. In the end the heads are
    planned by the gates, which meets the budget exactly whatever the training has come to; gates other than 1 are first folded
    into the output projections.

    Args:
        method: "hard_concrete" (L0 by a Lagrangian), "subset" (exactly so many by Gumbel top k), "l1" or "group_lasso" (proximal
            steps), "movement".
        steps, lr, gate_lr, weight_decay, ramp, warm_up, dropout: headprune.schedules.gate_training.GateTraining.
        teacher: distil from the dense model while the gates are trained; distil: as in `hp.recover`.
        train (in options): the training data; default `batches`, which compensation reads. A list of batches, or an iterable
            that can be read again and again.
        recover (in options): training after the cut.

    The rest is as in `one_shot`; criterion and trials are not read.
    """
    check_arguments(pruning_aware, locals())
    check_training(method, steps, lr, gate_lr, weight_decay, ramp, warm_up)
    if distil is not None and not teacher:
        raise InvalidInput("distil is given without a teacher; give teacher=True, which is the dense model.")
    setting = Setting.of(model, batches, budget, options)
    setting.refuse_untrainable()
    training = GateTraining(steps, lr, gate_lr, weight_decay, ramp, warm_up, dropout, setting.seed)
    own = {"method": method, "training": asdict(training), "teacher": teacher, "distil": described(distil)}
    record = Record(setting.dense, folder, NAME, {**setting.to_json(), **own})
    measure_dense(setting, record, NAME)
    if record.present.number:
        return finished(setting, record, NAME, record.restore())
    clock = Clock("step 1 of 1", setting.progress)
    with failing(setting, record, NAME, clock):
        objective = {"loss_fn": setting.loss_fn, "teacher": setting.dense if teacher else None, "distil": distil}
        trained = record.restore()
        state = None if record.folder is None else record.folder / "training.pt"
        with own_attention(trained, keep=True):
            trainer = trainer_for(setting, trained, method, training, objective)
            with clock.timed("train gates") as progress:
                trainer.train(setting.training_data, state, progress)
            chosen = plan(trained_scores(trainer), budget, **setting.planning)
            gates = trainer.settled()
        model = trainer.model
        fold_gates(model, gates)
        pruned(setting, model, chosen, clock)
        report = recovered(setting, model, 1, 1, record.recovery_folder(1), clock)
        quality = measured(setting, model, clock)
    details = {"method": method, "gates": {name: gate.tolist() for name, gate in gates.items()}, **course(trainer)}
    step = described_step(setting, 1, budget.fraction, dict(chosen), quality, clock, recovery=summary(report), **details)
    record.accept(step, model, plan_of(setting, step.keep, method))
    if state is not None:
        state.unlink(missing_ok=True)
    return finished(setting, record, NAME, model)


def trainer_for(
    setting: Setting, model: nn.Module, method: str, training: GateTraining, objective: Mapping[str, Any]
) -> GateTrainer:
    """model: a copy of the dense one, trained in place. objective: the options of recovery's Objective."""
    model = replace_multihead_attention(model)
    sites = {name: site for name, site in sites_by_name(model).items() if site.head_map.query_heads}
    layout = layout_for(setting)
    norms = torch.stack([column_norms(sites[unit.site])[list(unit.heads)].mean() for unit in layout.units])
    gates = get_gate_method(method)(layout, norms / norms.mean().clamp(min=1e-30))
    return GateTrainer(model, sites, gates.to(next(model.parameters()).device), training, Objective(model, **objective))


def layout_for(setting: Setting) -> GateLayout:
    shapes = shapes_of(setting.dense)
    equal = HeadScores("equal", {name: torch.zeros(shape.head_map.query_heads) for name, shape in shapes.items()}, shapes)
    protected = protected_heads(equal, setting.planning.get("protect", ()))
    granularity = granularity_for(setting.planning.get("granularity"), setting.budget)
    return GateLayout.of(shapes, setting.budget, granularity, {name: sorted(heads) for name, heads in protected.items()})


def trained_scores(trainer: GateTrainer) -> HeadScores:
    return trainer.layout.scores(trainer.gates.name, trainer.gates.importance())


def course(trainer: GateTrainer) -> dict[str, Any]:
    """How the training went, for the history: the mean loss in each tenth of it, the share open in the end and what was asked."""
    losses, tenth = trainer.losses, max(1, len(trainer.losses) // 10)
    means = [sum(part) / len(part) for part in (losses[start : start + tenth] for start in range(0, len(losses), tenth))]
    return {
        "losses": means,
        "open_share": trainer.gates.open_share(trainer.end),
        "goal": trainer.layout.goal,
        "through_operator": sorted(trainer.operator),
    }
