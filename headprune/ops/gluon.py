"""The warp-specialised Gluon kernel for Hopper, behind the attention operator: bf16 and fp16, head_dim 64 and 128."""

from __future__ import annotations

import importlib.util
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from headprune.ops.backend import Implementation, forced, register
from headprune.ops.call import AttentionCall

# (head_dim, causal, statistics) of the calls that a GPU has shown right (tests/ops/test_gluon.py) and faster than the plain Triton
# kernel (bench/bench_gpu_hopper.py). All others run it only inside `ops.backend("gluon")`.
VERIFIED = frozenset({(128, False, False), (128, True, False)})


@lru_cache(maxsize=1)
def missing() -> str | None:
    if torch.version.hip:  # where MI200 calls itself 9.0, too
        return "runs on NVIDIA's GPUs alone"
    found = importlib.util.find_spec("triton")
    if found is None or found.origin is None:
        return "triton is not installed"
    hopper = Path(found.origin).parent / "experimental" / "gluon" / "language" / "nvidia" / "hopper"
    return None if hopper.is_dir() else "this Triton has no Gluon for Hopper"


def refuses(call: AttentionCall) -> str | None:
    head_dim, device = call.query.shape[3], call.query.device
    if forced() != "gluon" and (head_dim, call.causal, call.stats) not in VERIFIED:
        return "not shown right and faster on a GPU; ops.backend('gluon') forces it"
    if device.type != "cuda":
        return f"runs on CUDA devices, not {device.type}"
    if torch.cuda.get_device_capability(device) != (9, 0):
        return f"runs on compute capability 9.0, not {'.'.join(map(str, torch.cuda.get_device_capability(device)))}"
    return unsupported(call)


def unsupported(call: AttentionCall) -> str | None:
    """What of the call the kernel does not do, on whatever device."""
    from headprune.kernels.hopper_launch import unfit

    head_dim = call.query.shape[3]
    if call.query.dtype not in (torch.bfloat16, torch.float16):
        return f"runs bf16 and fp16, not {call.query.dtype}"
    if head_dim not in (64, 128) or call.value_dim != head_dim:
        return f"head_dim {head_dim} with value_dim {call.value_dim} (64 or 128, both the same)"
    if not (call.query.numel() and call.key.numel()):
        return "an empty dimension"
    if call.scale <= 0:
        return f"scale {call.scale} (above 0)"
    options = {"window": call.window, "softcap": call.softcap}
    tensors = {"bias": call.bias, "alibi_slopes": call.alibi_slopes, "sinks": call.sinks, "key_mask": call.key_mask}
    if call.stats:
        tensors["query_mask"] = call.query_mask
    used = [name for name, value in options.items() if value] + [name for name, value in tensors.items() if value is not None]
    if used:
        return f"no {', '.join(used)}"
    reasons = (unfit(name, getattr(call, name)) for name in ("query", "key", "value"))
    return next((reason for reason in reasons if reason), None)


def attention_forward(call: AttentionCall) -> tuple[Tensor, Tensor, Tensor]:  # pragma: no cover (needs a CUDA device)
    from headprune.kernels.hopper_launch import attention_forward_hopper

    output, lse, stats = call.empty_output(), call.empty_lse(), call.empty_stats()
    gate = None if call.gate is None else call.gate.contiguous()
    attention_forward_hopper(
        call.query, call.key, call.value, output, lse, call.head_map.kv_of_query, causal=call.causal, scale=call.scale, gate=gate,
        stats=stats if call.stats else None,
    )  # fmt: skip
    return output, lse, stats


def register_gluon() -> None:
    register("attention", Implementation("gluon", attention_forward, refuses, missing))
