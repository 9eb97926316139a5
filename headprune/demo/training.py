"""A plain training loop for a causal language model, which goes on from where it was killed."""

from __future__ import annotations

import logging
import math
import pickle
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from headprune.files import whole_file

SAVE_EVERY = 20.0  # seconds of training that a kill costs at most
FINAL_RATE = 0.05  # of the peak learning rate, where the cosine ends
log = logging.getLogger("headprune")


@dataclass(frozen=True)
class Training:
    """A fixed number of steps, so that the result does not hang on the machine's speed."""

    steps: int = 1000
    batch: int = 2
    window: int = 256
    learning_rate: float = 2e-3
    warm_up: int = 60
    weight_decay: float = 0.1
    clip: float = 1.0
    seed: int = 0

    def rate(self, step: int) -> float:
        """The learning rate of a step: linear warm-up, then a cosine."""
        cosine = 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return self.learning_rate * min((step + 1) / self.warm_up, FINAL_RATE + (1 - FINAL_RATE) * cosine)


def train(
    model: nn.Module, stream: Tensor, training: Training, state: Path, progress: Callable[[int, int], None] | None = None
) -> None:
    """Trains `model` in place on random windows of `stream` [tokens], and leaves it in eval mode.

    At the start and every 20 seconds what is needed to go on is written to the file `state`, and taken up where it is found
    there: as the windows of a step depend on nothing but the seed and its number, the result is that without the kill.
    """
    optimizer = adamw(model, training)
    first = take_up(state, model, optimizer)
    if not first:
        save_state(state, 0, model, optimizer)  # a cache that cannot be written shows before the training, not after it
    saved = time.monotonic()
    model.train()
    for step in range(first, training.steps):
        for group in optimizer.param_groups:
            group["lr"] = training.rate(step)
        windows = random_windows(stream, training, step)
        optimizer.zero_grad()
        model(input_ids=windows, labels=windows, use_cache=False).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), training.clip)
        optimizer.step()
        if time.monotonic() - saved > SAVE_EVERY:
            save_state(state, step + 1, model, optimizer)
            saved = time.monotonic()
        if progress:
            progress(step + 1, training.steps)
    model.eval()


def adamw(model: nn.Module, training: Training) -> torch.optim.AdamW:
    """AdamW that lets norms and biases be."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": training.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)


def random_windows(stream: Tensor, training: Training, step: int) -> Tensor:
    """[batch, window] of step number `step`."""
    generator = torch.Generator().manual_seed(training.seed * training.steps + step)
    starts = torch.randint(len(stream) - training.window + 1, (training.batch, 1), generator=generator)
    return stream[starts + torch.arange(training.window)]


def save_state(state: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    with whole_file(state) as draft, draft.open("wb") as file:
        torch.save({"step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)


def take_up(state: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """The number of steps that an earlier try has done, its state loaded; 0 where there is none."""
    if not state.exists():
        return 0
    try:
        found = torch.load(state, weights_only=True)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
        log.warning("%s cannot be read (%s); training starts anew", state, type(error).__name__)
        return 0
    model.load_state_dict(found["model"])
    optimizer.load_state_dict(found["optimizer"])
    log.info("training goes on from step %d", found["step"])
    step: int = found["step"]
    return step
