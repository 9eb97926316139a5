"""The training loop: transformers' Trainer with our loss, our evaluation and our reasons to stop."""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.training_args import ParallelMode

from headprune.errors import InvalidInput
from headprune.files import write_text
from headprune.models.batches import length_of, unlabelled
from headprune.recovery.batches import opened
from headprune.recovery.budget import TrainingBudget, TrainingClock, of_first_rank
from headprune.recovery.good_state import GoodState
from headprune.scoring.passes import in_eval_mode

log = logging.getLogger("headprune")
COMPLETE = "complete"  # the file that a checkpoint gets last
SAVE_SECONDS = 60.0


class NotFinite(Exception):
    """The loss became NaN or infinite; where is the message."""


class RecoveryTrainer(Trainer):
    """objective(model, batch): the loss, a scalar. measure(model): how good the model is, higher is better, instead of the loss
    on eval_dataset. still: modules that are trained in eval mode, without dropout. budget, clock, good: when to stop, and what to
    go back to."""

    def __init__(
        self,
        *,
        objective: Callable[[nn.Module, Any], Tensor],
        measure: Callable[[nn.Module], float] | None,
        still: Sequence[nn.Module],
        budget: TrainingBudget,
        clock: TrainingClock,
        good: GoodState,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.objective: Callable[[nn.Module, Any], Tensor] = objective
        self.measure, self.still = measure, still
        self.budget, self.clock, self.good = budget, clock, good
        self.model_accepts_loss_kwargs = False  # each batch counts as one, however many labels it holds
        self.remove_callback(PrinterCallback)

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Tensor:
        for module in self.still:
            module.training = False
        with self.accelerator.autocast():
            loss = self.objective(model, opened(inputs))
        finite = self.everywhere(bool(torch.isfinite(loss.detach())))
        if not finite:
            why = ", whose batch has no label that counts" if unlabelled(opened(inputs)) else ""
            raise NotFinite(f"the loss is NaN or infinite at step {self.state.global_step + 1}{why}")
        return loss

    def _prepare_input(self, data: Any) -> Any:
        if hasattr(data, "_make"):  # a named tuple, for which transformers would give all values as the first one
            return data._make(map(self._prepare_input, data))
        return super()._prepare_input(data)

    def everywhere(self, fact: bool) -> bool:
        """Whether it holds on every rank."""
        if self.args.world_size == 1:
            return fact
        return bool(self.accelerator.reduce(torch.tensor(float(fact), device=self.args.device), "sum") == self.args.world_size)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if self.lr_scheduler is None:
            steps_of: Any = optimizer or self.optimizer
            by_clock = self.budget.minutes is not None
            factor = lambda step: self.budget.factor(step, self.clock.agreed() if by_clock else 0.0)  # noqa: E731
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(steps_of, factor)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log({**logs, "seconds": self.clock.seconds()}, start_time)

    @torch.no_grad()
    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """{"eval_quality": higher is better}: what `measure` gives, else minus the mean loss over the evaluation batches."""
        model: Any = self.model
        with in_eval_mode(model):
            quality = self.mean_quality() if self.measure is None else of_first_rank(float(self.measure(model)))
        if not self.everywhere(math.isfinite(quality)):
            raise NotFinite(f"the evaluation gave {quality} at step {self.state.global_step}")
        found = {f"{metric_key_prefix}_quality": quality}
        self.log(found)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, found)
        return found

    def mean_quality(self) -> float:
        total, rows = torch.zeros(2, dtype=torch.float64), length_of(self.eval_dataset)
        batches = math.inf if rows is None else math.ceil(rows / self.args.eval_batch_size)
        model: Any = self.model
        for turn, batch in enumerate(self.get_eval_dataloader()):
            with self.accelerator.autocast():
                loss = self.objective(model, opened(self._prepare_inputs(batch)))
            if turn * self.args.world_size + self.args.process_index < batches:  # behind them the first ones come again
                total += torch.tensor([float(loss), 1.0], dtype=torch.float64)
        total = self.accelerator.reduce(total.float().to(self.args.device), "sum")
        return -float(total[0] / total[1])

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            write_text(Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}" / COMPLETE, "")


class Watch(TrainerCallback):
    """Decides after each step whether to evaluate, save or stop; why it stopped is in `reason`."""

    def __init__(
        self,
        trainer: RecoveryTrainer,
        *,
        evaluations: bool,
        every: int | None,
        patience: int,
        saves: bool,
        save_every: int | None,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self.trainer, self.evaluations, self.every, self.patience = trainer, evaluations, every, patience
        self.saves, self.save_every, self.progress = saves, save_every, progress
        self.reason: str | None = None
        self.saved, self.tenths = 0.0, 0

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        trainer = self.trainer
        seconds = [entry["seconds"] for entry in state.log_history if "seconds" in entry]
        trainer.clock.earlier = max(seconds, default=0.0)
        self.saved = trainer.clock.agreed()
        self.tenths = int(10 * trainer.budget.fraction(state.global_step, self.saved))
        if not (state.global_step and trainer.good.take_up()):
            trainer.good.keep(state.global_step)
        if self.evaluations and not state.global_step:
            trainer.evaluate()

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        step, seconds = state.global_step, self.trainer.clock.agreed()
        fraction = self.trainer.budget.fraction(step, seconds)
        ends = fraction >= 1
        due = self.due(step, fraction) or ends
        if due and self.evaluations:
            control.should_evaluate = True
        elif due:
            self.keep(step)
        if self.saves and (step % self.save_every == 0 if self.save_every else seconds - self.saved > SAVE_SECONDS):
            control.should_save, self.saved = True, seconds
        if ends:
            control.should_training_stop = True
            self.reason = self.reason or "the budget is used up"
        if self.progress:
            self.progress(*((step, args.max_steps) if self.trainer.budget.steps else (int(1000 * fraction), 1000)))

    def keep(self, step: int, value: float | None = None) -> None:
        if not self.trainer.everywhere(self.trainer.good.keep(step, value)):
            raise NotFinite(f"weights are NaN or infinite after step {step}")

    def due(self, step: int, fraction: float) -> bool:
        if self.every is not None:
            return step % self.every == 0
        tenths, self.tenths = self.tenths, int(10 * fraction)
        return self.tenths > tenths

    def on_evaluate(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        qualities = [entry["eval_quality"] for entry in state.log_history if "eval_quality" in entry]
        best, good = max(qualities), self.trainer.good
        if qualities[-1] == best and (good.value is None or best > good.value):
            self.keep(state.global_step, best)
        since = len(qualities) - 1 - qualities.index(best)
        if since >= self.patience:
            control.should_training_stop = True
            self.reason = f"no better for {since} evaluations"


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint in `folder` that was written to its end; broken ones are removed."""
    found = []
    for path in folder.glob("checkpoint-*"):
        if (path / COMPLETE).exists():
            found.append(path)
        else:
            shutil.rmtree(path, ignore_errors=True)
    return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def training_arguments(
    folder: Path, budget: TrainingBudget, seed: int, options: dict[str, Any], place: torch.device
) -> TrainingArguments:
    """place: where the model is. InvalidInput for an option that transformers.TrainingArguments does not know."""
    per_step = 1 if budget.steps is None else max(1, budget.steps // 1000)
    chosen = {
        "report_to": "none", "disable_tqdm": True, "logging_steps": per_step, "logging_nan_inf_filter": False, "weight_decay": 0.0,
        "max_grad_norm": 1.0, "save_total_limit": 2, "per_device_train_batch_size": 1, "per_device_eval_batch_size": 1,
        "log_level": "error",
        "use_cpu": not torch.accelerator.is_available(),  # or several ranks on the CPU would not meet
        **options,
        "output_dir": str(folder), "max_steps": budget.max_steps, "learning_rate": budget.peak,
        "seed": seed, "eval_strategy": "no", "save_strategy": "no", "remove_unused_columns": False,
    }  # fmt: skip
    if chosen.get("deepspeed") and find_spec("deepspeed") is None:
        raise InvalidInput("recover: deepspeed=... needs the package: pip install deepspeed.")
    try:
        found = TrainingArguments(**chosen)
    except ImportError:
        raise InvalidInput('recover needs accelerate: pip install "headprune[recovery]".') from None
    refuse_partitioned(found)
    found._setup_devices  # noqa: B018 (decides how many devices there are, which is then overruled)
    found._n_gpu = min(found._n_gpu, 1)  # whole batches cannot be spread by DataParallel; torchrun runs several
    stay(found, place)
    return found


def stay(arguments: Any, place: torch.device) -> None:
    """A single process trains on the GPU that the model is on: transformers takes the first one whatever it is told, accelerate
    the current one."""
    alone = arguments.parallel_mode is ParallelMode.NOT_PARALLEL and not arguments.deepspeed
    if alone and place.type == arguments.device.type == "cuda":
        arguments.__dict__["_setup_devices"] = place  # what arguments.device has cached
        arguments.distributed_state.device = place  # accelerate's, which all its states share


def refuse_partitioned(arguments: Any) -> None:
    """The trained model must be whole on each rank, here and when its best state is kept."""
    plugin = getattr(arguments, "deepspeed_plugin", None)
    if plugin is not None and plugin.hf_ds_config.is_zero3():
        raise InvalidInput(
            "recover: DeepSpeed's ZeRO stage 3 leaves each rank a part of every parameter, and the model would end empty; "
            "use stage 2, or fsdp=True, which shards the same and gathers the model afterwards."
        )


def leave_deepspeed(trainer: Trainer) -> None:
    """Each parameter has memory of its own again: DeepSpeed lays all of them into one tensor."""
    engine = getattr(trainer, "deepspeed", None)
    if engine is None:
        return
    engine.destroy()
    model: Any = trainer.model
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()


def history(trainer: Trainer, key: str) -> tuple[tuple[int, float], ...]:
    """(step, value) of every log entry that has `key`."""
    return tuple((int(entry["step"]), entry[key]) for entry in trainer.state.log_history if key in entry)
