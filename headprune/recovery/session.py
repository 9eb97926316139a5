"""One training, from its settings to its result; what the trainer touches on a model is put back."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy
import torch
import transformers
from torch import Tensor, nn

from headprune.errors import InvalidInput
from headprune.models.checkpointing import checkpointed
from headprune.nn.linear import through_onednn
from headprune.recovery.batches import collator_of, on_the_host
from headprune.recovery.budget import TrainingBudget, TrainingClock
from headprune.recovery.good_state import GoodState
from headprune.recovery.objective import Objective
from headprune.recovery.result import BEST, BEST_PART, WENT_BACK, Recovery
from headprune.recovery.sharding import OPTIONS as FSDP

log = logging.getLogger("headprune")
PREPARED = "_is_accelerate_prepared"  # what has it an Accelerator returns as it is: not wrapped, compiled or put on a device
FEW = 10  # steps, which teach next to nothing
RISEN = 1.5  # times as much as at first is more than what single batches differ by
CHECKPOINTING = ("gradient_checkpointing", "activation_checkpointing")  # the older and the newer name


@dataclass(frozen=True)
class Session:
    """All that a training is told; see `recover`. folder: where checkpoints go; keeps: whether they are to outlive a kill.
    sharded: whether each rank holds a part of the model. place: where the model was. options: of transformers.TrainingArguments."""

    data: Any
    held_out: Any
    objective: Objective
    budget: TrainingBudget
    folder: Path
    keeps: bool
    clock: Callable[[], float]
    metric: Callable[[nn.Module], float] | None
    patience: int
    seed: int
    dropout: bool
    collator: Callable[..., Any] | None
    callbacks: Sequence[Any]
    progress: Callable[[int, int], None] | None
    sharded: bool
    place: torch.device
    options: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def arguments(self) -> Any:
        """transformers.TrainingArguments; under torchrun the ranks meet when they are made."""
        from headprune.recovery.training import training_arguments  # Trainer takes a second to import, and needs accelerate

        left_out = ("eval_steps", "save_steps", *FSDP, *(() if self.dropout else CHECKPOINTING))
        own = {name: value for name, value in self.options.items() if name not in left_out}
        pinned = torch.cuda.is_available() and on_the_host(self.data) and on_the_host(self.held_out)
        return training_arguments(self.folder, self.budget, self.seed, {"dataloader_pin_memory": pinned, **own}, self.place)

    @property
    def device(self) -> torch.device:
        device: torch.device = self.arguments.device
        return device

    def checkpointing(self, model: nn.Module) -> AbstractContextManager[Any]:
        """Ours where transformers' own would do nothing: in eval mode."""
        wanted = any(self.options.get(name) for name in CHECKPOINTING) and not self.dropout
        return checkpointed(model) if wanted else nullcontext()

    @property
    def evaluates(self) -> bool:
        return self.held_out is not None or self.metric is not None


def trained(model: nn.Module, session: Session, still: Sequence[nn.Module]) -> Recovery:
    """Trains those parameters of `model` that ask for gradients, with its modules `still` in eval mode. Raises InvalidInput where
    the first loss is not finite."""
    from headprune.recovery import training
    from headprune.recovery.sharded_training import ShardedTrainer

    arguments = session.arguments
    if any(parameter.numel() == 0 for parameter in model.parameters()):  # of a layer without heads, which no gradient reaches
        arguments.ddp_find_unused_parameters = True
    rank, ranks = arguments.process_index, arguments.world_size
    best = session.folder / (BEST_PART.format(rank, ranks) if session.sharded else BEST)
    good = GoodState(model, best if session.keeps else None, writes=session.sharded or rank == 0)
    kind = ShardedTrainer if session.sharded else training.RecoveryTrainer
    trainer = kind(
        objective=session.objective, measure=session.metric, still=still, budget=session.budget,
        clock=TrainingClock(session.clock), good=good, model=model, args=arguments, train_dataset=session.data,
        eval_dataset=session.held_out, data_collator=collator_of(session.data, session.collator), callbacks=list(session.callbacks),
    )  # fmt: skip
    watch = training.Watch(
        trainer, evaluations=session.evaluates, every=session.options.get("eval_steps"), patience=session.patience,
        saves=session.keeps, save_every=session.options.get("save_steps"), progress=session.progress,
    )  # fmt: skip
    trainer.add_callback(watch)
    last = training.last_checkpoint(session.folder)
    if last is not None:
        log.info("recovery goes on from %s", last)
    broken = None
    hook = model.register_forward_hook(pooled_too) if ranks > 1 else None
    try:
        with through_onednn(model):
            trainer.train(resume_from_checkpoint=None if last is None else str(last))
    except training.NotFinite as problem:
        if not trainer.state.global_step:
            raise InvalidInput(f"{problem}, before anything was trained; look for empty labels or overflow.") from None
        broken = f"{problem}; {WENT_BACK} {good.step}"
        log.warning("recovery stopped: %s", broken)
    finally:
        training.leave_deepspeed(trainer)
        if hook is not None:
            hook.remove()
    steps, minutes, warmup = trainer.state.global_step, session.budget.minutes, session.budget.warmup
    if minutes is not None and broken is None and steps < max(FEW, warmup):
        log.warning("recovery: %d steps fit into minutes=%g, the first %d at a rising rate; give more", steps, minutes, warmup)
    went_back = broken is not None or good.value is not None
    if went_back:
        good.restore()
    result = Recovery(
        losses=training.history(trainer, "loss"),
        evaluations=training.history(trainer, "eval_quality"),
        steps=steps,
        seconds=trainer.clock.seconds(),
        best=good.value,
        best_step=good.step if went_back else steps,
        stopped_because=broken or watch.reason or "the budget is used up",
    )
    first, at_last = result.loss_ends
    if first is not None and at_last is not None and at_last > RISEN * first > 0 and not (broken or session.evaluates):
        log.warning("recovery: the training loss rose from %.3g to %.3g; lower lr, or give eval to keep the best", first, at_last)
    return result


def pooled_too(model: nn.Module, inputs: Any, output: Any) -> Any:
    """A forward hook: the loss of an encoder reaches its pooler, with gradients of 0. DDP waits for the gradients of all that an
    output comes from, and many losses read the hidden states alone."""
    states, pooled = (getattr(output, name, None) for name in ("last_hidden_state", "pooler_output"))
    if isinstance(states, Tensor) and isinstance(pooled, Tensor) and pooled.requires_grad:
        output.last_hidden_state = states + 0 * pooled.sum()
    return output


@contextmanager
def as_it_was(model: nn.Module) -> Iterator[None]:
    """Modes, and what Trainer sets on a model and its config, are afterwards as before."""
    training = {module: module.training for module in model.modules()}
    config: Any = getattr(model, "config", None)
    caches = getattr(config, "use_cache", None)
    forward = model.__dict__.get("forward")
    prepared = PREPARED in vars(model)
    verbosity = transformers.utils.logging.get_verbosity()
    try:
        yield
    finally:
        for module, was in training.items():
            module.training = was
        if caches is not None:
            config.use_cache = caches
        model.__dict__.pop("forward", None)  # mixed precision wraps it
        model.__dict__.pop("_original_forward", None)
        if forward is not None:
            model.forward = forward
        if not prepared:
            vars(model).pop(PREPARED, None)
        model.zero_grad(set_to_none=True)
        transformers.utils.logging.set_verbosity(verbosity)


@contextmanager
def own_random_state(seed: int) -> Iterator[None]:
    """Inside the block torch starts from `seed`; afterwards torch, numpy and Python, which Trainer seeds, draw as if nothing had
    been."""
    python, of_numpy = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            numpy.random.set_state(of_numpy)
