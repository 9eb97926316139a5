"""What a pruned transformers model does otherwise than its class: its own `save_pretrained` (so Trainer's checkpoints, and
push_to_hub) writes what AutoModel needs, and continuous batching takes layers with any number of key/value heads."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from headprune.errors import InvalidInput
from headprune.models.behaviour import Behaviour, behave, combined
from headprune.models.paged import batched_continuously
from headprune.surgery import manifest
from headprune.surgery.per_layer_config import validated_quietly
from headprune.surgery.remote_code import write_remote_code


class SavedWithCode(Behaviour):
    """A pruned transformers model: in all else an instance of its class."""

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        *arguments: Any,
        push_to_hub: bool = False,
        **options: Any,
    ) -> None:
        if push_to_hub:
            raise InvalidInput("save_pretrained(push_to_hub=True) uploads before the model's code is there; call push_to_hub().")
        stock: Any = super()
        with validated_quietly():
            stock.save_pretrained(save_directory, is_main_process, *arguments, **options)
        folder, model = Path(save_directory), self
        alone = getattr(self, "_hf_peft_config_loaded", False)  # adapters, without the model
        if is_main_process and not alone and isinstance(model, PreTrainedModel) and (folder / "config.json").is_file():
            write_remote_code(model, folder)
            (folder / manifest.FILE).unlink(missing_ok=True)  # digests of what `hp.save` wrote there before

    def init_continuous_batching(self, *arguments: Any, **options: Any) -> Any:
        stock: Any = super()
        return batched_continuously(self, lambda: stock.init_continuous_batching(*arguments, **options))


def save_with_code(model: PreTrainedModel, original: type | None = None) -> None:
    """From now on `model.save_pretrained` does. original: the class of the model, where it was loaded as another."""
    if original is not None:
        model.__class__ = combined(SavedWithCode, original)
    elif not isinstance(model, SavedWithCode):
        behave(model, SavedWithCode)
