"""Functional operators for attention with any head count and ragged groups, on the best backend that this machine has.

`headprune.ops.reference` is their specification in plain PyTorch.
"""

from headprune.ops import cpp, cuda, cuda_weights, fallback, gluon, triton, triton_backward, triton_decode, triton_weights
from headprune.ops.attention import attention, library
from headprune.ops.autocast import register_autocast
from headprune.ops.backend import backend, choose, operators
from headprune.ops.decode import attention_decode
from headprune.ops.sdpa import scaled_dot_product_attention
from headprune.ops.stats import HeadStats
from headprune.ops.varlen import attention_varlen
from headprune.ops.weight_slices import HeadSlices, HeadSpan, WeightStats
from headprune.ops.weight_stats import head_weight_stats

cpp.register_cpp()
triton_decode.register_attention()
gluon.register_gluon()
triton.register_triton()
triton_backward.register_triton_backward()
cuda.register_where_faster()
triton_decode.register_decode()
cuda.register_where_asked_for()
cuda_weights.register_where_faster()
triton_weights.register_weights()
cuda_weights.register_where_asked_for()
fallback.register_reference()
register_autocast(library)

__all__ = [
    "HeadSlices",
    "HeadSpan",
    "HeadStats",
    "WeightStats",
    "attention",
    "attention_decode",
    "attention_varlen",
    "backend",
    "choose",
    "head_weight_stats",
    "operators",
    "scaled_dot_product_attention",
]
