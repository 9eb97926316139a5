"""Where a model runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from headprune.errors import InvalidInput
from headprune.models.streamed import streamed_of


def device_of(model: nn.Module) -> torch.device:
    """Of the model's first parameter; for a model that is read from disk layer by layer the device that its layers run on."""
    streamed = streamed_of(model)
    return next(model.parameters()).device if streamed is None else streamed.device


def chosen_device(name: str) -> torch.device:
    """The device that `name` means: "auto" is the first GPU where there is one, else the CPU. InvalidInput where it is not here."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    here = devices_here()
    if name not in (*here, *(["cuda"] if len(here) > 1 else ())):
        raise InvalidInput(f"device is {name!r}; this machine has {', '.join(here)}. Give one of them, or auto.")
    return torch.device(name)


def devices_here() -> list[str]:
    return ["cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]


def refuse_absent(device: torch.device | str) -> None:
    """InvalidInput where `device` is a GPU of CUDA that is not here. Devices of other kinds speak for themselves."""
    found = torch.device(device)
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise InvalidInput(f"device is {str(device)!r}; this machine has {', '.join(devices_here())}. Give one of them.")


def trainer_options(device: torch.device) -> dict[str, Any]:
    """What makes `recover` train on `device`, where the model is: by itself it takes a GPU wherever there is one."""
    return {"use_cpu": True} if device.type == "cpu" and torch.accelerator.is_available() else {}
