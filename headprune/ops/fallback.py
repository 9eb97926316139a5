"""Registers the reference behind every operator: it comes last, after every faster implementation, and refuses nothing."""

from __future__ import annotations

from headprune.ops import reference
from headprune.ops.backend import Implementation, register


def register_reference() -> None:
    runs = {
        "attention": reference.attention_forward,
        "attention_backward": lambda call, grad_output, output, lse, needs: reference.attention_backward(call, grad_output, needs),
        "attention_varlen": reference.attention_varlen_forward,
        "attention_varlen_backward": lambda call, grad_output, output, lse, needs: reference.attention_varlen_backward(
            call, grad_output, needs
        ),
        "attention_decode": reference.attention_decode,
    }
    for operator, run in runs.items():
        register(operator, Implementation("reference", run, refuses=lambda call: None))
