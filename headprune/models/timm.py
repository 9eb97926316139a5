"""timm's vision transformers: `qkv` and `proj`, in `Attention` (ViT, DeiT, DINOv2, SigLIP) and Swin's `WindowAttention`."""

from __future__ import annotations

import logging
from weakref import WeakSet

from torch import nn

from headprune.errors import UnsupportedModel
from headprune.head_map import HeadMap
from headprune.models.adapters import head_map_of, register_adapter
from headprune.models.emptied import EmptiedTimm
from headprune.models.fused_layout import blocks
from headprune.models.head_counts import set_head_counts
from headprune.models.quantised import weight_shape
from headprune.models.site import AttentionSite, Foreign, HeadTensor, check_projection, contiguous_heads
from headprune.models.specialise import empty

TABLE = "relative_position_bias_table"
PARTS = ("qkv", "proj", "proj_drop", "num_heads", "scale", "fused_attn")

log = logging.getLogger("headprune")
left_out: WeakSet[nn.Module] = WeakSet()  # sites are asked for many times; each module is told of once


class Timm:
    """Both kinds take the number of heads from an attribute and the features from what the projections give."""

    name = "timm"

    def site(self, name: str, module: Foreign) -> AttentionSite | None:
        windowed = hasattr(module, TABLE)
        if not all(getattr(module, part, None) is not None for part in PARTS) or not (windowed or hasattr(module, "attn_dim")):
            tell_of_pooling(name, module)
            return None
        refuse_mixing_of_heads(name, module)
        check_projection(f"{name}.proj", module.proj)
        # A window attention does not keep it, and an emptied one has nothing to derive it from but its scale.
        head_dim = getattr(module, "head_dim", None) or round(module.scale**-2)
        hidden, features = weight_shape(module.proj)
        head_map = head_map_of(module, features, features, head_dim, name)
        projections = (
            *blocks(f"{name}.qkv", module.qkv, head_map, head_dim),
            contiguous_heads("output", f"{name}.proj", module.proj, head_map.query_heads, head_dim),
        )
        extras = (HeadTensor(f"{name}.{TABLE}", module, TABLE, dim=1),) if windowed else ()
        refuse_other_weights(name, module, {id(module.qkv), id(module.proj)}, {TABLE}, head_dim)
        return AttentionSite(name, module, module, head_map, head_dim, head_dim, hidden, "self", projections, extras, windowed)

    def after_cut(self, site: AttentionSite, head_map: HeadMap, kept: tuple[int, ...]) -> None:
        set_head_counts(site.module, head_map, site.head_dim)
        if not head_map.query_heads:
            empty(site.module, "proj", EmptiedTimm)


def tell_of_pooling(name: str, module: Foreign) -> None:
    """`global_pool="map"` pools by an attention (AttentionPoolLatent, AttentionPoolPrr) whose code fixes its width."""
    if type(module).__name__.startswith("AttentionPool") and hasattr(module, "num_heads") and module not in left_out:
        left_out.add(module)
        log.warning("%s (%s) pools by attention and keeps all of its %d heads", name, type(module).__name__, module.num_heads)


def refuse_mixing_of_heads(name: str, module: Foreign) -> None:
    """A norm over all heads divides each by a statistic of all; a gate behind the heads acts in the place of pruning's."""
    for part, fact in (("norm", "a norm over all heads"), ("gate", "a gate behind its heads")):
        if any(True for _ in getattr(getattr(module, part, None), "parameters", tuple)()):
            raise UnsupportedModel(f"{name} has {fact} ({part}): cutting heads would differ from gating them.")


def refuse_other_weights(name: str, module: Foreign, projections: set[int], tables: set[str], head_dim: int) -> None:
    """Whatever is not as long as one head (a norm that all share) may belong to single heads: BEiT's biases do."""
    for path, part in module.named_modules():
        for attribute, parameter in () if id(part) in projections else part.named_parameters(path, recurse=False):
            if attribute not in tables and tuple(parameter.shape) != (head_dim,):
                raise UnsupportedModel(
                    f"{name}.{attribute} {list(parameter.shape)} may belong to single heads, and no adapter knows how; "
                    "CONTRIBUTING.md shows how to add one."
                )


register_adapter(Timm())
