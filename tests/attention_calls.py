"""Random calls of the attention operator, with any of its options."""

from dataclasses import dataclass, replace

import torch

from headprune import HeadMap
from headprune.ops.call import AttentionCall, check_call

EPSILON = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


@dataclass(frozen=True)
class Shape:
    groups: tuple[int, ...] = (2, 1, 3)
    batch: int = 2
    query_len: int = 37
    kv_len: int = 37
    head_dim: int = 20
    value_dim: int = 12

    @property
    def head_map(self) -> HeadMap:
        return HeadMap(tuple(kv for kv, size in enumerate(self.groups) for _ in range(size)), len(self.groups))


def make_call(
    shape: Shape, options: tuple[str, ...] = (), dtype=torch.float32, layout: str = "heads", seed: int = 0
) -> AttentionCall:
    """A random call with the named options switched on."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator)

    def rows(heads: int, length: int, dim: int) -> torch.Tensor:
        size = (shape.batch, heads, length, dim)
        if layout == "tokens":
            return normal(shape.batch, length, heads, dim).transpose(1, 2).to(dtype)
        if layout == "columns":
            return normal(shape.batch, heads, dim, length).transpose(2, 3).to(dtype)
        return normal(*size).to(dtype)

    heads, full = shape.head_map.query_heads, (shape.batch, shape.head_map.query_heads, shape.query_len, shape.kv_len)
    key_mask = torch.rand(shape.batch, shape.kv_len, generator=generator) < 0.7
    gate = normal(heads)
    gate[::3] = 0
    chosen = {
        "causal": {"causal": True},
        "window": {"window": 9},
        "softcap": {"softcap": 1.5},
        "bias": {"bias": normal(*full).masked_fill(torch.rand(full, generator=generator) < 0.2, float("-inf"))},
        "bool_bias": {"bias": torch.rand(full[0], 1, *full[2:], generator=generator) < 0.6},
        "row_bias": {"bias": normal(1, heads, 1, shape.kv_len)},
        "alibi": {"alibi_slopes": torch.rand(heads, generator=generator)},
        "sinks": {"sinks": normal(heads)},
        "key_mask": {"key_mask": key_mask},
        "padding": {"key_mask": torch.arange(shape.kv_len)[None, :] >= torch.arange(shape.batch)[:, None] * 5 + 1},
        "query_mask": {"query_mask": torch.rand(shape.batch, shape.query_len, generator=generator) < 0.5},
        "gate": {"gate": gate},
        "sample_gate": {"gate": torch.stack([gate.roll(b) for b in range(shape.batch)]) if shape.batch else gate[None][:0]},
        "stats": {"stats": True},
    }
    scale = shape.head_dim**-0.5 if shape.head_dim else 1.0
    call = AttentionCall(
        rows(heads, shape.query_len, shape.head_dim), rows(len(shape.groups), shape.kv_len, shape.head_dim),
        rows(len(shape.groups), shape.kv_len, shape.value_dim), shape.head_map, False, 0, scale,
        0.0, None, None, None, None, None, None, False,
    )  # fmt: skip
    for option in options:
        call = replace(call, **chosen[option])
    return check_call(call)


OPTIONS = ("causal", "window", "softcap", "bias", "bool_bias", "row_bias", "alibi", "sinks", "key_mask", "padding", "query_mask",
           "gate", "sample_gate", "stats")  # fmt: skip


def in_fp64(call: AttentionCall) -> AttentionCall:
    return replace(call, query=call.query.double(), key=call.key.double(), value=call.value.double())
