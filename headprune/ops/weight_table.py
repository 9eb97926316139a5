"""Which kernel of the weight statistics is the faster one.

Not measured on a GPU yet: until bench/bench_gpu_weight_stats.py has been run the table is empty, and Triton is preferred.
"""

from __future__ import annotations

import torch

from headprune.ops.weight_slices import WeightCall

# (dtype, with gradients): the backend that bench/bench_gpu_weight_stats.py found faster.
FASTER: dict[tuple[torch.dtype, bool], str] = {}


def faster_weight_backend(call: WeightCall) -> str:
    """ "cuda" or "triton"."""
    return FASTER.get((call.dtype, bool(call.grads)), "triton")
