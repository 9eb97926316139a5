"""Which kernel of the weight statistics is the faster one, from bench/bench_gpu_weight_stats.py."""

from __future__ import annotations

import torch

from headprune.ops.weight_slices import WeightCall

# (dtype, with gradients), on an H200: CUDA takes 0.96, 0.98 and 0.97 of Triton's time. fp32 without gradients: 1.01.
FASTER = {(torch.bfloat16, False): "cuda", (torch.bfloat16, True): "cuda", (torch.float32, True): "cuda"}


def faster_weight_backend(call: WeightCall) -> str:
    """ "cuda" or "triton"."""
    return FASTER.get((call.dtype, bool(call.grads)), "triton")
