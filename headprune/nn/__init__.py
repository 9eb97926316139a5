"""VariableHeadAttention, the drop-in for torch.nn.MultiheadAttention, and how to swap it into a model."""

from headprune.nn.attention import VariableHeadAttention
from headprune.nn.replace import replace_multihead_attention

__all__ = ["VariableHeadAttention", "replace_multihead_attention"]
