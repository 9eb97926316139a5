"""A profile of forward passes, to be opened in a trace viewer."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

from headprune.evaluation.data import placed
from headprune.evaluation.latency import synchronize
from headprune.files import whole_file
from headprune.models.placement import device_of

PASSES = 3


@torch.inference_mode()
def write_trace(models: Mapping[str, nn.Module], inputs: Mapping[str, Tensor], target: str | Path, passes: int = PASSES) -> Path:
    """Writes a Chrome trace (JSON; chrome://tracing, ui.perfetto.dev) of `passes` forward passes of each model in turn, after one
    to warm up; each pass is a span with the model's name. Returns the path."""
    devices = [device_of(model) for model in models.values()]
    for model in models.values():
        model(**placed(model, inputs))
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if any(one.type == "cuda" for one in devices) else [])]
    with profile(activities=activities, record_shapes=True) as found:
        for _ in range(passes):
            for name, model in models.items():
                with record_function(name):
                    model(**placed(model, inputs))
                    synchronize(device_of(model))
    with whole_file(target) as draft:
        found.export_chrome_trace(str(draft))
        if not draft.stat().st_size:  # the profiler leaves it so on a full disk, and says nothing
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return Path(target)
