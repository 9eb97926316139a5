"""SAM and its relatives. Vision attentions (of ViTDet, GOT-OCR2 and SegGPT too) have a fused `qkv` and take pictures [batch,
rows, columns, features] or windows of them; SAM 2 and Hiera pool their queries between stages. Those of the mask decoder take
tokens [batch, prompts, tokens, features] of each prompt of a picture, or [batch * prompts, 1, tokens, features]."""

from __future__ import annotations

from dataclasses import replace

from headprune.head_map import HeadMap
from headprune.models.adapters import register_adapter
from headprune.models.bert import Named
from headprune.models.emptied import Emptied, EmptiedAsAsked, EmptiedPooled, EmptiedPooledAlone
from headprune.models.fused import Fused
from headprune.models.fused_layout import blocks
from headprune.models.separate import unknown_parameters
from headprune.models.site import AttentionSite, Foreign

DECODER = ("q_proj", "k_proj", "v_proj", "out_proj")


def tables_of_window(module: Foreign) -> bool:
    """Tables of relative positions along rows and columns, one for all heads, or nothing but the projections."""
    return hasattr(module, "scale") and not unknown_parameters(module, {"qkv", "proj", "rel_pos_h", "rel_pos_w"})


def is_sam(module: Foreign) -> bool:
    return hasattr(module, "use_rel_pos") and tables_of_window(module)


def is_vitdet(module: Foreign) -> bool:
    own = ("use_relative_position_embeddings", "num_heads")
    return all(hasattr(module, part) for part in own) and tables_of_window(module)


def is_seggpt(module: Foreign) -> bool:
    own = ("use_relative_position_embeddings", "num_attention_heads")
    return all(hasattr(module, part) for part in own) and tables_of_window(module)


class SegGpt(Fused):
    """Its model runs all pictures and behind them all their prompts."""

    def site(self, name: str, module: Foreign) -> AttentionSite | None:
        site = super().site(name, module)
        return site and replace(site, in_turn=True)


def is_sam2(module: Foreign) -> bool:
    return hasattr(module, "query_stride") and hasattr(module, "config") and tables_of_window(module)


def is_hiera(module: Foreign) -> bool:
    """Takes [batch, tokens, features], whatever the windows."""
    return hasattr(module, "use_mask_unit_attn") and tables_of_window(module)


def hiera_after(site: AttentionSite, head_map: HeadMap, kept: tuple[int, ...]) -> None:
    module: Foreign = site.module
    module.hidden_size_output = head_map.query_heads * site.head_dim


def size_in_decoder(module: Foreign) -> int | None:
    """It projects to `internal_dim` features, of which it keeps the number when heads go."""
    known = hasattr(module, "internal_dim") and hasattr(module, "scaling")
    return round(module.scaling**-2) if known and not unknown_parameters(module, set(DECODER)) else None


register_adapter(Fused("sam", "qkv", "proj", "scale", is_sam, lambda module: blocks, windowed=True))
register_adapter(Fused("vitdet", "qkv", "proj", "scale", is_vitdet, lambda module: blocks, emptied=EmptiedAsAsked, windowed=True))
register_adapter(SegGpt("seggpt", "qkv", "proj", "scale", is_seggpt, lambda module: blocks, windowed=True))
register_adapter(Fused("sam2", "qkv", "proj", "scale", is_sam2, lambda module: blocks, emptied=EmptiedPooledAlone, windowed=True))
register_adapter(
    Fused("hiera", "qkv", "proj", "head_dim", is_hiera, lambda module: blocks, after=hiera_after, emptied=EmptiedPooled)
)
# The annotation of its forward says that it returns no weights; it does.
register_adapter(Named("mask_decoder", DECODER, head_dim=size_in_decoder, emptied=Emptied, windowed=True))
