"""The last state of a training that is known to be good, to go back to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from headprune.files import whole_file
from headprune.recovery.sharding import reshard


class GoodState:
    """A copy of what training changes (parameters that ask for gradients, floating-point buffers; of a sharded model this rank's
    parts), on the CPU and, with `path`, on disk, so that a killed run still has it."""

    def __init__(self, model: nn.Module, path: Path | None = None, writes: bool = True) -> None:
        self.model, self.path, self.writes = model, path, writes
        self.step = 0
        self.value: float | None = None
        self.saved: dict[str, Tensor] = {}

    def changing(self) -> dict[str, Tensor]:
        reshard(self.model)
        found: dict[str, Any] = {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        found |= {name: buffer for name, buffer in self.model.named_buffers() if buffer.is_floating_point()}
        return {name: tensor.to_local() if hasattr(tensor, "to_local") else tensor for name, tensor in found.items()}

    @torch.no_grad()
    def keep(self, step: int, value: float | None = None) -> bool:
        """Takes the present state, unless some of it is not finite; whether it did. value: how good it is."""
        tensors = self.changing()
        if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values()):
            return False
        self.step, self.value = step, value
        self.saved = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
        if self.path is not None and self.writes:
            content = {name: tensor.contiguous() for name, tensor in self.saved.items()}
            with whole_file(self.path) as draft:
                save_file(content, draft, {"step": str(step), "value": json.dumps(value)})
        return True

    @torch.no_grad()
    def restore(self) -> None:
        """Puts the state back into the model."""
        for name, tensor in self.changing().items():
            if name in self.saved:
                tensor.copy_(self.saved[name])

    def take_up(self) -> bool:
        """Reads what an earlier try wrote; whether there was something."""
        if self.path is None or not self.path.exists():
            return False
        with safe_open(self.path, "pt") as file:
            metadata = file.metadata()
            self.saved = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        self.step, self.value = int(metadata["step"]), json.loads(metadata["value"])
        return True
