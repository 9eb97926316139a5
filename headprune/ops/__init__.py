"""Functional operators for attention with any head count and ragged groups, on the best backend that this machine has.

`headprune.ops.reference` is their specification in plain PyTorch.
"""

from headprune.ops import cpp, triton
from headprune.ops.attention import attention, register_reference
from headprune.ops.backend import backend, choose, operators
from headprune.ops.stats import HeadStats

cpp.register_cpp()
triton.register_triton()
register_reference()

__all__ = ["HeadStats", "attention", "backend", "choose", "operators"]
