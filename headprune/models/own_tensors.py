"""What heads have beside their projections, found by the names that transformers gives it."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from headprune.models.site import Foreign, HeadTensor

# Biases that an attention adds itself: one after another (DeBERTa; [1, 1, heads * head_dim] in LayoutLMv2) or [heads, head_dim]
# (Transformer-XL's positions in conformers).
BIASES = ("q_bias", "v_bias", "pos_bias_u", "pos_bias_v")
MADE = "continuous_position_bias_mlp"  # (distances) -> [distances, heads]
TABLE = "relative_position_bias_table"  # [distances, heads], in a part of the attention (BEiT and its relatives)


def own_tensors(name: str, attention: Foreign, head_dim: int) -> tuple[HeadTensor, ...]:
    """Those of `attention`, which stands at `name`."""
    biases = {bias: tensor for bias in BIASES if isinstance(tensor := getattr(attention, bias, None), Tensor)}
    tables = [part for part, child in attention.named_children() if isinstance(getattr(child, TABLE, None), Tensor)]
    return (
        *(
            HeadTensor(f"{name}.{bias}", attention, bias)
            if tensor.dim() == 2
            else HeadTensor(f"{name}.{bias}", attention, bias, dim=tensor.dim() - 1, width=head_dim)
            for bias, tensor in biases.items()
        ),
        *(HeadTensor(f"{name}.{part}", getattr(attention, part), TABLE, dim=1) for part in tables),
        *of_window(name, attention),
    )


def in_windows(attention: Foreign) -> bool:
    """Whether it runs the windows of a picture (Donut, MaskFormer's Swin, Swin V2)."""
    return hasattr(attention, "window_size") and hasattr(attention, "relative_position_index")


def of_window(name: str, attention: Foreign) -> Iterator[HeadTensor]:
    """A table of positions of its own, or the scale of each head and the layer that makes the positions (Swin V2)."""
    if not in_windows(attention):
        return
    if TABLE in attention._parameters:
        yield HeadTensor(f"{name}.{TABLE}", attention, TABLE, dim=1)
    if hasattr(attention, MADE):
        yield HeadTensor(f"{name}.logit_scale", attention, "logit_scale")
        yield HeadTensor(f"{name}.{MADE}.2", getattr(attention, MADE)[2], "weight")
