"""Where a model runs."""

from __future__ import annotations

import torch
from torch import nn

from headprune.models.streamed import streamed_of


def device_of(model: nn.Module) -> torch.device:
    """Of the model's first parameter; for a model that is read from disk layer by layer the device that its layers run on."""
    streamed = streamed_of(model)
    return next(model.parameters()).device if streamed is None else streamed.device
