"""The training loop on a sharded model: nothing wraps it again, and each rank writes its part of a checkpoint."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from headprune.recovery.training import RecoveryTrainer

OPTIONS = StateDictOptions(ignore_frozen_params=True, strict=False)
PARTS, RATES = "sharded", "scheduler.pt"


class ShardedTrainer(RecoveryTrainer):
    """For a model inside `sharded`."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.accelerator.prepare_model = partial(self.accelerator.prepare_model, evaluation_mode=True)  # or it would add DDP

    def parts(self) -> dict[str, Any]:
        model: Any = self.model
        optimizer: Any = self.optimizer
        weights, state = get_state_dict(model, getattr(optimizer, "optimizer", optimizer), options=OPTIONS)
        return {"model": weights, "optimizer": state}

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        state_dict_saver.save(self.parts(), checkpoint_id=Path(str(output_dir or self.args.output_dir)) / PARTS)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        scheduler: Any = self.lr_scheduler
        if self.args.should_save:
            torch.save(scheduler.state_dict(), Path(output_dir) / RATES)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Weights come with the optimizer, which is not made yet here."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        parts = self.parts()
        state_dict_loader.load(parts, checkpoint_id=Path(checkpoint) / PARTS)
        model: Any = self.model
        optimizer: Any = self.optimizer
        scheduler: Any = self.lr_scheduler
        set_state_dict(
            model, getattr(optimizer, "optimizer", optimizer), model_state_dict=parts["model"], optim_state_dict=parts["optimizer"],
            options=OPTIONS,
        )  # fmt: skip
        scheduler.load_state_dict(torch.load(Path(checkpoint) / RATES, weights_only=True))
