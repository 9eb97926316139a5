"""Training in fp32 what is kept in half precision: a step of usual size is smaller than the distance between two bf16 numbers, and
rounding would undo it (Micikevicius et al. 2018, section 3.1)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

HALF = (torch.float16, torch.bfloat16)
CHOSEN = ("bf16", "fp16", "deepspeed")  # with one of these the caller has said what is computed in what


def mixed_precision(model: nn.Module, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of transformers.TrainingArguments by which a half-precision model goes on computing in half precision."""
    half = any(parameter.dtype in HALF for parameter in model.parameters())
    if not half or any(options.get(name) is not None for name in CHOSEN) or not computes_in_bf16():
        return {}
    return {"bf16": True}


def computes_in_bf16() -> bool:
    return not torch.cuda.is_available() or torch.cuda.is_bf16_supported()


@contextmanager
def master_weights(model: nn.Module, wanted: bool) -> Iterator[None]:
    """Inside the block the half-precision parameters of `model` that ask for gradients are fp32; afterwards they are rounded."""
    before = {one: one.dtype for one in model.parameters() if wanted and one.requires_grad and one.dtype in HALF}
    config: Any = getattr(model, "config", None)
    dtype = getattr(config, "dtype", None)
    for parameter in before:
        parameter.data = parameter.data.float()
    try:
        yield
    finally:
        for parameter, was in before.items():
            parameter.grad = None
            parameter.data = parameter.data.to(was)
        if before and dtype is not None:
            config.dtype = dtype  # a checkpoint says there what it holds
