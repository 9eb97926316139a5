"""SAM and its relatives. Vision attentions (ViTDet's and GOT-OCR2's too) have a fused `qkv` and take pictures [batch, rows,
columns, features] or windows of them; those of the mask decoder take tokens [batch, prompts, tokens, features] of each prompt of a
picture, or [batch * prompts, 1, tokens, features]."""

from __future__ import annotations

from headprune.models.adapters import register_adapter
from headprune.models.bert import Named
from headprune.models.emptied import EmptiedAsAsked
from headprune.models.fused import Fused
from headprune.models.fused_layout import blocks
from headprune.models.separate import unknown_parameters
from headprune.models.site import Foreign

DECODER = ("q_proj", "k_proj", "v_proj", "out_proj")


def size_of_head(module: Foreign) -> int:
    size: int = round(module.scale**-2)
    return size


def tables_of_window(module: Foreign) -> bool:
    """Tables of relative positions along rows and columns, one for all heads, or nothing but the projections."""
    return hasattr(module, "scale") and not unknown_parameters(module, {"qkv", "proj", "rel_pos_h", "rel_pos_w"})


def is_sam(module: Foreign) -> bool:
    return hasattr(module, "use_rel_pos") and tables_of_window(module)


def is_vitdet(module: Foreign) -> bool:
    """SegGPT, which counts num_attention_heads, runs a prompt and a picture as two samples far apart."""
    own = ("use_relative_position_embeddings", "num_heads")
    return all(hasattr(module, part) for part in own) and tables_of_window(module)


def size_in_decoder(module: Foreign) -> int | None:
    """It projects to `internal_dim` features, of which it keeps the number when heads go."""
    known = hasattr(module, "internal_dim") and hasattr(module, "scaling")
    return round(module.scaling**-2) if known and not unknown_parameters(module, set(DECODER)) else None


register_adapter(Fused("sam", "qkv", "proj", size_of_head, is_sam, lambda module: blocks, windowed=True))
register_adapter(
    Fused("vitdet", "qkv", "proj", size_of_head, is_vitdet, lambda module: blocks, emptied=EmptiedAsAsked, windowed=True)
)
register_adapter(Named("mask_decoder", DECODER, head_dim=size_in_decoder, windowed=True))
