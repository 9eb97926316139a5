"""Which backend takes which call: from the registered implementations and their own limits."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from headprune import ops
from headprune.ops import cpp, cuda, cuda_weights, decode_table, gluon, triton, triton_decode, weight_table
from headprune.ops.call import MOST_NEW_TOKENS

from .registry import generator, table

SHORT = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64"}


@generator("backends")
def backends() -> str:
    """The order in which each operator asks its backends."""
    rows = [[f"`{name}`", " → ".join(f"`{one.backend}`" for one in found)] for name, found in ops.operators().items()]
    return table(["operator", "asked in this order"], rows)


@generator("backend-limits")
def limits() -> str:
    any_shape = f"every option, head dim and value dim 1 to {triton.MOST_DIM}, any group size"
    decoding = f"up to {MOST_NEW_TOKENS} queries on {triton_decode.MANY_KEYS} keys and more; causal, no bias, no statistics"
    tensor_cores = f"head dim {', '.join(map(str, cuda._HEAD_DIMS))}, values as wide, rows of the caches 16-byte aligned"
    hopper = "compute capability 9.0, head dim 64 and 128, values as wide; causal, scale and gate, no other option"
    rows = [
        ["`cpp`", "CPU", f"{dtypes(*cpp._DTYPES)}; attentions also fp64", "every option, any head dim and group size"],
        ["`triton`", "CUDA", dtypes(*triton.DTYPES), any_shape],
        ["`triton-decode`", "CUDA", dtypes(*triton.DTYPES), f"`attention`: {decoding}"],
        ["`cuda`", "CUDA", dtypes(*cuda._DTYPES), f"`attention_decode`: {tensor_cores}; {asked_first(decode_table.FASTER, str)}"],
        ["`cuda`", "CUDA", dtypes(*cuda_weights._DTYPES), f"`head_weight_stats`; {asked_first(weight_table.FASTER, read)}"],
        ["`gluon`", "CUDA", dtypes(torch.float16, torch.bfloat16), f"`attention`: {hopper}; {unasked()}"],
        ["`reference`", "any", "any", "everything, in plain PyTorch, with the whole matrix of scores in memory"],
    ]
    return table(["backend", "device", "dtypes", "takes"], rows)


def dtypes(*found: torch.dtype) -> str:
    return ", ".join(name for dtype, name in SHORT.items() if dtype in found)


def read(key: tuple[torch.dtype, bool]) -> str:
    """A key of weight_table.FASTER in words."""
    dtype, gradients = key
    return f"{SHORT[dtype]} with{'' if gradients else 'out'} gradients"


def asked_first(faster: dict[Any, str], told: Callable[[Any], str]) -> str:
    where = [told(shape) for shape, backend in faster.items() if backend == "cuda"]
    return f"asked before Triton where it was measured to be faster: {', '.join(where) or 'nowhere yet'}"


def unasked() -> str:
    where = [
        f"head dim {dim}{', causal' if causal else ''}{', statistics' if stats else ''}"
        for dim, causal, stats in sorted(gluon.VERIFIED)
    ]
    return f"taken unasked where a GPU has shown it right and faster: {'; '.join(where) or 'nowhere yet'}"


@generator("operator-options")
def options() -> str:
    """Which operator has which of the attention's options."""
    operators = (ops.attention, ops.attention_varlen, ops.attention_decode, ops.scaled_dot_product_attention)
    known = [list(inspect.signature(one).parameters) for one in operators]
    names = [name for name in known[0] if name not in ("query", "key", "value")]
    rows = [[f"`{name}`", *("yes" if name in names else "" for names in known)] for name in names]
    return table(["option", *(f"`{one.__name__}`" for one in operators)], rows)
