"""Trains a model together with gates on its heads; a killed training goes on from its last saved state."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from headprune.errors import HeadpruneError
from headprune.files import whole_file
from headprune.models.site import AttentionSite
from headprune.models.uncompiled import uncompiled
from headprune.models.watching import through_headprune
from headprune.nn.linear import through_onednn
from headprune.recovery import Objective
from headprune.recovery.master_weights import master_weights, mixed_precision
from headprune.schedules.gates import GateLayout, GateMethod, Moment
from headprune.schedules.gates.reach import gates_in_place, through_operator
from headprune.schedules.spacing import cubic
from headprune.schedules.training_data import batches_from
from headprune.scoring.passes import frozen

log = logging.getLogger("headprune")
SAVE_EVERY = 20.0  # seconds of training that a kill costs at most
MEMORY = 0.95  # of the running size of the gates' gradients
CLIP = 1.0


@dataclass(frozen=True)
class GateTraining:
    """lr: of the weights, after a linear warm-up and falling linearly to 0; 0 freezes them. gate_lr: of the gates; default
    30 / steps, within 0.01 and 0.2. ramp: the share of the steps in which the goal is reached (cubic), after which the gates' rate
    falls. warm_up: a share of the steps too. dropout: whether the model's is on."""

    steps: int = 300
    lr: float = 3e-5
    gate_lr: float | None = None
    weight_decay: float = 0.0
    ramp: float = 0.6
    warm_up: float = 0.1
    dropout: bool = True
    seed: int = 0

    def gate_rate(self, step: int) -> float:
        """Of the gates: constant until the goal is reached, then falling to 0."""
        highest = min(0.2, max(0.01, 30 / self.steps)) if self.gate_lr is None else self.gate_lr
        return highest * min(1.0, (1 - step / self.steps) / max(1 - self.ramp, 1e-6))

    def rate(self, step: int) -> float:
        """Of the weights."""
        return self.lr * min((step + 1) / max(self.warm_up * self.steps, 1), 1 - step / self.steps)

    def moment(self, step: int, goal: float, scale: float) -> Moment:
        done = step / self.steps
        open_share = 1 - cubic(1 - goal, min(1.0, done / self.ramp)) if self.ramp else goal
        return Moment(done, open_share, self.gate_rate(step), scale)


@dataclass
class GateTrainer:
    """model: trained in place. sites: by name. objective: the loss of a batch. operator: the sites that get their gates through the
    operator."""

    model: nn.Module
    sites: Mapping[str, AttentionSite]
    gates: GateMethod
    training: GateTraining
    objective: Objective
    operator: frozenset[str] = frozenset()
    scale: float = 0.0
    losses: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        weights = [parameter for parameter in self.model.parameters() if parameter.requires_grad] if self.training.lr else []
        groups = [{"params": weights, "lr": self.training.lr, "weight_decay": self.training.weight_decay}] if weights else []
        learnt = list(self.gates.parameters())
        if learnt:
            groups.append({"params": learnt, "lr": self.training.gate_rate(0), "weight_decay": 0.0, "gates": True})
        self.weights = weights
        self.optimizer = torch.optim.AdamW(groups) if groups else None
        self.mixed = bool(weights and mixed_precision(self.model, {}))

    @property
    def layout(self) -> GateLayout:
        return self.gates.layout

    def train(self, data: Any, state: Path | None, progress: Callable[[int, int], None] | None) -> None:
        """Raises HeadpruneError where the loss is not finite; the state before that step is saved."""
        with master_weights(self.model, self.mixed):
            self.train_all(data, state, progress)

    def train_all(self, data: Any, state: Path | None, progress: Callable[[int, int], None] | None) -> None:
        first, steps, saved = self.take_up(state), self.training.steps, time.monotonic()
        with self.ready(next(batches_from(data, 0, 1, self.training.seed))):
            for step, batch in enumerate(batches_from(data, first, steps, self.training.seed), start=first):
                loss = self.one_step(step, batch)
                if not math.isfinite(loss):
                    self.save(state, step)
                    raise HeadpruneError(
                        f"the loss is {loss} at training step {step + 1} of {steps}; lower lr (now {self.training.lr:g}), or "
                        "look at that batch."
                    )
                self.losses.append(loss)
                if time.monotonic() - saved > SAVE_EVERY:
                    self.save(state, step + 1)
                    saved = time.monotonic()
                if progress:
                    progress(step + 1, steps)
        self.save(state, steps)

    @contextmanager
    def ready(self, batch: Any) -> Iterator[None]:
        """The model in training mode and on our attention, with a random state of its own, and a teacher where there is one."""
        training = self.model.training
        devices = sorted({p.device.index or 0 for p in self.model.parameters() if p.device.type == "cuda"})
        with ExitStack() as stack:
            stack.callback(self.model.train, training)
            stack.enter_context(through_headprune(self.model))
            stack.enter_context(through_onednn(self.model))
            stack.enter_context(uncompiled(self.model))
            stack.enter_context(torch.random.fork_rng(devices))
            stack.enter_context(self.objective.ready(next(self.model.parameters()).device, batch))
            if not self.weights:
                stack.enter_context(frozen(self.model))
            self.operator = through_operator(self.model, self.sites, lambda: self.loss(batch))
            self.model.train(self.training.dropout)
            yield

    def loss(self, batch: Any) -> Tensor:
        with torch.autocast(next(self.model.parameters()).device.type, torch.bfloat16, enabled=self.mixed):
            return self.objective(self.model, batch)

    def one_step(self, step: int, batch: Any) -> float:
        """The loss; where it is not finite nothing was changed."""
        torch.manual_seed(self.training.seed * 1_000_003 + step)
        moment = self.training.moment(step, self.layout.goal, self.scale)
        drawn = self.gates(moment)
        drawn.retain_grad()
        with gates_in_place(self.sites, self.operator, self.layout.by_site(drawn)):
            loss = self.loss(batch)
            if not bool(loss.isfinite()):
                return float(loss.detach())
            if self.optimizer:
                self.optimizer.zero_grad()
            loss.backward()  # with the gates in place: checkpointed layers run again here
        gradient = torch.zeros_like(drawn) if drawn.grad is None else drawn.grad.detach()
        size = float(gradient[self.gates.free].square().mean().sqrt()) if bool(self.gates.free.any()) else 0.0
        self.scale = size if not self.scale else MEMORY * self.scale + (1 - MEMORY) * size
        moment = self.training.moment(step, self.layout.goal, self.scale)
        penalty = self.gates.penalty(moment)
        if penalty is not None:
            penalty.backward()
        self.update(step)
        with torch.no_grad():
            self.gates.after_step(moment, gradient)
        return float(loss.detach())

    def update(self, step: int) -> None:
        if self.weights:
            nn.utils.clip_grad_norm_(self.weights, CLIP)
        if self.optimizer:
            for group in self.optimizer.param_groups:
                group["lr"] = (self.training.gate_rate if group.get("gates") else self.training.rate)(step)
            self.optimizer.step()

    @property
    def end(self) -> Moment:
        return self.training.moment(self.training.steps, self.layout.goal, self.scale)

    def settled(self) -> dict[str, Tensor]:
        """Site name -> the gates [query_heads] that stand in the end."""
        return {name: gate.detach().cpu() for name, gate in self.layout.by_site(self.gates.settled(self.end)).items()}

    def save(self, state: Path | None, step: int) -> None:
        if state is None:
            return
        content = {
            "step": step,
            "scale": self.scale,
            "losses": self.losses,
            "model": self.model.state_dict(),
            "gates": self.gates.state_dict(),
            "optimizer": self.optimizer.state_dict() if self.optimizer else None,
        }
        with whole_file(state) as draft, draft.open("wb") as file:
            torch.save(content, file)

    def take_up(self, state: Path | None) -> int:
        """The number of steps that an earlier try has done, its state loaded."""
        if state is None or not state.exists():
            return 0
        found = torch.load(state, weights_only=True)
        self.model.load_state_dict(found["model"])
        self.gates.load_state_dict(found["gates"])
        if self.optimizer:
            self.optimizer.load_state_dict(found["optimizer"])
        self.scale, self.losses = found["scale"], found["losses"]
        log.info("training of gates goes on from step %d", found["step"])
        step: int = found["step"]
        return step
