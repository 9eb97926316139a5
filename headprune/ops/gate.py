"""A gate on the heads of a module's attention, put there from outside while the model runs as ever."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

GATE = "attention_gate"  # the attribute of a gated module


@contextmanager
def gated_attention(module: nn.Module, gate: Tensor) -> Iterator[None]:
    """Inside the block the attentions that `module` computes have `gate` [query_heads] on their heads, differentiable; heads
    whose gate is exactly 0 are not computed. Only for modules that call `headprune.ops.watch.attention_of`."""
    before = getattr(module, GATE, None)
    module.__dict__[GATE] = gate  # past nn.Module, which would register a parameter
    try:
        yield
    finally:
        if before is None:
            del module.__dict__[GATE]
        else:
            module.__dict__[GATE] = before


def gate_of(module: nn.Module, own: Tensor | None = None) -> Tensor | None:
    """The gate on `module`, times its `own`; None where there is neither."""
    gate: Tensor | None = getattr(module, GATE, None)
    if gate is None or own is None:
        return own if gate is None else gate
    return gate * own
