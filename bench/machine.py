"""The machine that a result was measured on."""

from __future__ import annotations

import importlib.metadata
import os
import platform

import torch

from headprune.processor import processor_name


def machine(device: str) -> dict[str, object]:
    """Names and versions that go into a result file, and `slug`, which names it."""
    gpu = torch.cuda.get_device_name(0) if device == "cuda" else None
    found: dict[str, object] = {
        "processor": f"{processor_name()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "gpu": gpu,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "transformers": version("transformers"),
        "cuda": torch.version.cuda,
    }
    found["slug"] = slug(gpu or str(found["processor"]))
    return found


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def slug(name: str) -> str:
    return "-".join("".join(letter.lower() if letter.isalnum() else " " for letter in name).split())
