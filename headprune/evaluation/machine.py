"""The machine that this runs on, by the name that a measured time goes with."""

from __future__ import annotations

import torch

from headprune.processor import processor_name


def machine_name(device: torch.device) -> str:
    """`device` and what runs on it: what a latency is good for."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{processor_name()}, {torch.get_num_threads()} threads"
    beside = "" if device.type in ("cpu", "cuda") else f", {device.type}"  # Apple's GPU is a part of its processor
    return f"{name}{beside}, torch {torch.__version__}"


def machines_here() -> list[str]:
    """The names of this machine's devices."""
    devices = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    return [machine_name(torch.device(device)) for device in devices]
