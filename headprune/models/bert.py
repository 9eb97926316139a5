"""Encoders whose projections have names of their own: BERT (RoBERTa, ELECTRA, I-BERT, ConvBERT, BigBird and their like), MPNet, the
vision transformers built like it (YOLOS, ViLT, VideoMAE, data2vec, CvT, PVT v2), LayoutLM, DeBERTa, DistilBERT, ALBERT, LXMERT,
Perceiver, conformers (wav2vec 2.0, SeamlessM4T, FastSpeech 2), VITS, the Q-Former of BLIP-2."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import nn

from headprune.head_map import HeadMap
from headprune.models.adapters import head_map_of, register_adapter
from headprune.models.convbert_forward import OwnConvBert
from headprune.models.emptied import Emptied, EmptiedAlbert, EmptiedAlone
from headprune.models.emptied_form import empty_alike, forward_of, returns_alone
from headprune.models.head_counts import set_head_counts
from headprune.models.ibert_forward import EmptiedIBert
from headprune.models.own_positions import OwnPositions, PositionsThird, remember_positions
from headprune.models.own_tensors import in_windows, own_tensors
from headprune.models.quantised import weight_shape
from headprune.models.reduced_forward import OwnReduced
from headprune.models.site import (
    AttentionSite,
    Foreign,
    HeadTensor,
    ProjectionHeads,
    Role,
    at,
    check_filled,
    check_projection,
    contiguous_heads,
    features_in_order,
)
from headprune.models.specialise import empty, specialise
from headprune.models.switched import SwitchesAttention

CROSS = ("cross_attention.attention", "visual_attention")  # where Perceiver and LXMERT keep theirs
ROLES: tuple[Role, ...] = ("query", "key", "value", "output")


@dataclass(frozen=True)
class Named:
    """Paths below the attention module; there is one key/value head per query head.

    projections: in the order of ROLES. inner: the part that computes the attention, where the output projection stands beside
    it ("" = the module itself). more: further projections with a slice per head, which a module may lack. head_dim: its attribute
    there, or a function of that part that gives it (None where it is of another kind); value_dim: that of the values where they
    have one. emptied: what becomes of an attention without heads; None: it returns what it returned with them. windowed: as in
    AttentionSite.
    """

    name: str
    projections: tuple[str, str, str, str]
    inner: str = ""
    more: tuple[tuple[Role, str], ...] = ()
    head_dim: str | Callable[[Foreign], int | None] = "attention_head_size"
    value_dim: str | None = None
    emptied: type | None = None
    windowed: bool = False

    def site(self, name: str, module: Foreign) -> AttentionSite | None:
        parts = [*zip(ROLES, self.projections), *((role, path) for role, path in self.more if at(module, path) is not None)]
        dispatcher = at(module, self.inner) if self.inner else module
        # A layer has a feed-forward, whose output may be called as an attention's (TVP).
        if hasattr(module, "intermediate") or not all(isinstance(at(module, path), nn.Module) for _, path in parts):
            return None
        head_dim = self.head_dim(dispatcher) if callable(self.head_dim) else getattr(dispatcher, self.head_dim, None)
        if head_dim is None:
            return None
        output, features = at(module, self.projections[3]), weight_shape(at(module, self.projections[0]))[0]
        head_map = head_map_of(dispatcher, features, features, head_dim, name)
        value_dim = head_dim if self.value_dim is None else getattr(dispatcher, self.value_dim)
        widths: dict[Role, int] = {"query": head_dim, "key": head_dim, "value": value_dim, "output": value_dim}
        projections = tuple(
            contiguous_heads(role, f"{name}.{path}", at(module, path), head_map.query_heads, widths[role]) for role, path in parts
        )
        crossing = "Cross" in type(dispatcher).__name__ or "cross" in name.rpartition(".")[2] or name.endswith(CROSS)
        return AttentionSite(
            name, module, dispatcher, head_map, head_dim, value_dim, weight_shape(output)[0], "cross" if crossing else "self",
            projections, own_tensors(f"{name}.{self.inner}".strip("."), dispatcher, head_dim),
            windowed=self.windowed or sees_parts(module, dispatcher) or in_windows(dispatcher),
        )  # fmt: skip

    def after_cut(self, site: AttentionSite, head_map: HeadMap, kept: tuple[int, ...]) -> None:
        module: Foreign = site.dispatcher
        output = None if self.inner else self.projections[3]
        if getattr(module, "position_embeddings_type", None) != "rotary":  # then the states turn, as wide as all heads
            set_head_counts(module, head_map, site.head_dim)
        if self.head_dim != "head_size" and hasattr(module, "head_size"):  # LXMERT's name for the width of all heads
            module.head_size = head_map.query_heads * site.head_dim
        if has_shared_positions(module):
            remember_positions(site.module, site.head_map.query_heads, kept)
            specialise(site.module, OwnPositions)
        if hasattr(site.module, "set_attention_type"):
            specialise(site.module, SwitchesAttention)
        if not head_map.query_heads:
            empty(module, output, self.emptied) if self.emptied else empty_alike(module, output)


class BigBirdPegasus(Named):
    """Its output projection is a layer itself."""

    def site(self, name: str, module: Foreign) -> AttentionSite | None:
        return super().site(name, module) if isinstance(getattr(module, "output", None), nn.Linear) else None


class IBert(Named):
    """BERT whose layers round weights and states to integers once `quant_mode` is on; until then they keep room for those."""

    def site(self, name: str, module: Foreign) -> AttentionSite | None:
        site = super().site(name, module) if hasattr(at(module, "self.query"), "quant_mode") else None
        return site and replace(site, extras=tuple(room for part in site.projections for room in room_for_integers(part)))

    def inexact(self, site: AttentionSite) -> str | None:
        if not site.output.module.quant_mode:
            return None
        return "its output projection is rounded by the largest weight of all heads. Prune with quant_mode=False and round after."


class ConvBert(Named):
    """BERT with convolutions: a head attends with one half of its outputs and convolves with the other, and its query is read by
    the kernels of all heads, so that it stays."""

    def site(self, name: str, module: Foreign) -> AttentionSite | None:
        attention = at(module, self.inner)
        if not hasattr(attention, "conv_kernel_layer") or at(module, self.projections[3]) is None:
            return None
        width, query, output = attention.attention_head_size, attention.query, at(module, self.projections[3])
        rows = weight_shape(attention.value)[0]
        head_map = head_map_of(attention, rows, rows, width, name)
        heads, half = head_map.query_heads, features_in_order(head_map.query_heads, width)
        for path, layer in ((self.projections[0], query), (self.projections[3], output)):
            check_projection(f"{name}.{path}", layer)
        of_query = features_in_order(weight_shape(query)[0] // width, width)
        kept = list(getattr(attention, "position_heads", range(heads)))
        both = ProjectionHeads("output", f"{name}.{self.projections[3]}", output, torch.cat([half, half + heads * width], dim=1))
        check_filled(both)
        others: tuple[tuple[Role, str, int], ...] = (
            ("key", self.projections[1], width), ("value", self.projections[2], width), ("value", "self.conv_out_layer", width),
            ("value", "self.conv_kernel_layer", attention.conv_kernel_size),
        )  # fmt: skip
        projections = (
            ProjectionHeads("query", f"{name}.{self.projections[0]}", query, of_query[kept], whole=True),
            *(contiguous_heads(role, f"{name}.{path}", at(module, path), heads, size) for role, path, size in others),
            both,
        )
        return AttentionSite(name, module, attention, head_map, width, width, weight_shape(output)[0], "self", projections)

    def after_cut(self, site: AttentionSite, head_map: HeadMap, kept: tuple[int, ...]) -> None:
        remember_positions(site.dispatcher, site.head_map.query_heads, kept)
        specialise(site.dispatcher, OwnConvBert)
        super().after_cut(site, head_map, kept)


class Reduced(Named):
    """PVT v2, whose keys and values come from a smaller picture."""

    def site(self, name: str, module: Foreign) -> AttentionSite | None:
        return super().site(name, module) if hasattr(module, "spatial_reduction_ratio") else None

    def after_cut(self, site: AttentionSite, head_map: HeadMap, kept: tuple[int, ...]) -> None:
        specialise(site.module, OwnReduced)
        super().after_cut(site, head_map, kept)


class MPNet(Named):
    """MPNet, which makes its biases of positions once for all layers."""

    def site(self, name: str, module: Foreign) -> AttentionSite | None:
        taken = [*inspect.signature(forward_of(module)).parameters]
        return super().site(name, module) if taken[1:4] == ["hidden_states", "attention_mask", "position_bias"] else None

    def after_cut(self, site: AttentionSite, head_map: HeadMap, kept: tuple[int, ...]) -> None:
        remember_positions(site.module, site.head_map.query_heads, kept)
        specialise(site.module, PositionsThird)
        super().after_cut(site, head_map, kept)


class OfEmbedDim(Named):
    """Its forward takes the width of all heads from `embed_dim` (CvT)."""

    def after_cut(self, site: AttentionSite, head_map: HeadMap, kept: tuple[int, ...]) -> None:
        super().after_cut(site, head_map, kept)
        module: Foreign = site.dispatcher
        module.headprune_head_dim = site.head_dim
        module.embed_dim = head_map.query_heads * site.head_dim


class Vits(OfEmbedDim):
    """VITS, whose relative positions are the same for all heads."""

    def site(self, name: str, module: Foreign) -> AttentionSite | None:
        return super().site(name, module) if hasattr(module, "window_size") and hasattr(module, "embed_dim") else None


def has_shared_positions(module: Foreign) -> bool:
    """Whether the model makes biases of positions for all layers at once: of pictures (data2vec), of pages (LayoutLM)."""
    on_pages = any(getattr(module, own, False) for own in ("has_relative_attention_bias", "has_spatial_attention_bias"))
    return on_pages or getattr(getattr(module, "config", None), "use_shared_relative_position_bias", False)


def share_of_width(module: Foreign) -> int:
    """head_dim of a module that keeps the width of all heads alone."""
    known: int | None = getattr(module, "headprune_head_dim", None)
    return module.embed_dim // module.num_heads if known is None else known


def room_for_integers(part: ProjectionHeads) -> Iterator[HeadTensor]:
    width = part.features.shape[1]
    yield HeadTensor(f"{part.name}.weight_integer", part.module, "weight_integer", part.weight_dim, width, part.per_kv_head)
    if part.role != "output":
        for buffer in ("fc_scaling_factor", "bias_integer"):
            yield HeadTensor(f"{part.name}.{buffer}", part.module, buffer, 0, width, part.per_kv_head)


def sees_parts(module: nn.Module, attention: nn.Module) -> bool:
    """MobileViT's see parts of pictures as a batch; they are given states alone, and so no mask, and return no weights."""
    given = [*inspect.signature(forward_of(module)).parameters]
    return given == ["self", "hidden_states"] and returns_alone(attention)


PATHS = ("self.query", "self.key", "self.value", "output.dense")
register_adapter(IBert("ibert", PATHS, "self", emptied=EmptiedIBert))
register_adapter(ConvBert("convbert", PATHS, "self", emptied=Emptied))
register_adapter(Named("bert", PATHS, "self"))
register_adapter(Named("bert_vision", ("attention.query", "attention.key", "attention.value", "output.dense"), "attention"))
register_adapter(
    Named(
        "deberta", ("self.query_proj", "self.key_proj", "self.value_proj", "output.dense"), "self",
        # Positions have projections of their own, which the query and the key of the same head read.
        (("key", "self.pos_key_proj"), ("query", "self.pos_query_proj")),
    )
)  # fmt: skip
register_adapter(MPNet("mpnet", ("q", "k", "v", "o")))
register_adapter(BigBirdPegasus("bigbird_pegasus", ("self.query", "self.key", "self.value", "output"), "self"))
register_adapter(Named("lxmert", ("att.query", "att.key", "att.value", "output.dense"), "att"))
register_adapter(
    Named(
        "perceiver", ("self.query", "self.key", "self.value", "output.dense"), "self",
        head_dim="qk_channels_per_head", value_dim="v_channels_per_head",
    )
)  # fmt: skip
register_adapter(
    Named(
        "conditional_detr", ("q_content_proj", "k_content_proj", "v_proj", "o_proj"),
        # Of positions, added to a head's query and key or, in cross attention, put beside them.
        more=(("query", "q_pos_proj"), ("key", "k_pos_proj"), ("query", "q_pos_sine_proj")), head_dim="head_dim",
    )
)  # fmt: skip
register_adapter(Named("kosmos_vision", ("query", "key", "value", "output"), head_dim="head_dim"))
register_adapter(Reduced("pvt_v2", ("query", "key", "value", "proj")))
register_adapter(Vits("vits", ("q_proj", "k_proj", "v_proj", "out_proj"), head_dim="head_dim"))
register_adapter(
    OfEmbedDim(
        "cvt",
        ("attention.projection_query", "attention.projection_key", "attention.projection_value", "output.dense"),
        "attention", head_dim=share_of_width, emptied=EmptiedAlone,
    )
)  # fmt: skip
for name, head_dim in (("conformer", "head_size"), ("conformer_of_speech", "head_dim")):
    linear = ("linear_q", "linear_k", "linear_v", "linear_out")
    register_adapter(Named(name, linear, more=(("key", "linear_pos"),), head_dim=head_dim))
register_adapter(Named("distilbert", ("q_lin", "k_lin", "v_lin", "out_lin")))
# One module is several layers: what it loses they all lose.
register_adapter(Named("albert", ("query", "key", "value", "dense"), emptied=EmptiedAlbert))
