"""Attention whose query, key and value share one linear layer: GPT-2, Phi-3, MPT, ModernBERT, LayoutLMv2 (blocks), GPT-NeoX, BLOOM,
DeBERTa v1 (interleaved per head), Falcon (any of them), StarCoder (one key/value head behind all queries, or interleaved), and
others like them. Those of vision models: fused_vision.py."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from headprune.errors import UnsupportedModel
from headprune.head_map import HeadMap
from headprune.models.adapters import head_map_of, register_adapter
from headprune.models.cached import CachedFeatures
from headprune.models.emptied import Emptied, EmptiedBloom, EmptiedGraniteSpeech, EmptiedOpenAI, EmptiedWithBias
from headprune.models.emptied_form import empty_alike, forward_of
from headprune.models.fused_layout import blocks, key_value_blocks, per_group, per_head, places_in_groups, quarters
from headprune.models.head_counts import set_head_counts
from headprune.models.layer_config import follow_groups
from headprune.models.own_positions import GroupedFalcon, OwnPositions, remember_positions
from headprune.models.own_tensors import own_tensors
from headprune.models.own_width import OwnWidth, OwnWidthProjected
from headprune.models.quantised import weight_shape
from headprune.models.quarters import QuarteredHeads
from headprune.models.site import (
    AttentionSite,
    Foreign,
    Kind,
    ProjectionHeads,
    Role,
    at,
    check_projection,
    contiguous_heads,
    is_conv1d,
)
from headprune.models.specialise import empty, specialise

Layout = Callable[[str, Foreign, HeadMap, int], tuple[ProjectionHeads, ...]]


@dataclass(frozen=True)
class Fused:
    """One fused layout; registered once per kind of module.

    fused, output: paths below the module. head_dim: another (or to the scale, its root's reciprocal), or a function of the module.
    is_kind: tells it from others with the same. inner: the part that computes the attention, where the output projection stands
    beside it ("" = the module itself).
    layout: where the heads lie, or a function of the module that tells. kv_heads: key/value heads of a module that was never
    cut; default one per query head. after: what else a cut asks for. beside: what a cut of other attentions asks for. emptied:
    the forward that is left without heads; None: one that returns what it returned with them.
    runs_ragged: the module expands ragged groups by itself. cached: what a cache holds; None: as in AttentionSite. windowed: as
    there.
    """

    name: str
    fused: str
    output: str
    head_dim: str | Callable[[Foreign], int]
    is_kind: Callable[[Foreign], bool]
    layout: Callable[[Foreign], Layout]
    kv_heads: Callable[[Foreign], int] | None = None
    after: Callable[[AttentionSite, HeadMap, tuple[int, ...]], None] = lambda site, head_map, kept: None
    beside: Callable[[AttentionSite], None] = lambda site: None
    emptied: type | None = Emptied
    runs_ragged: bool = False
    cached: Callable[[Foreign], CachedFeatures | None] = lambda module: None
    inner: str = ""
    windowed: bool = False

    def site(self, name: str, module: Foreign) -> AttentionSite | None:
        fused, output = at(module, self.fused), at(module, self.output)
        if fused is None or output is None or (isinstance(self.head_dim, str) and at(module, self.head_dim) is None):
            return None
        if not self.is_kind(module):
            return None
        told = at(module, self.head_dim) if isinstance(self.head_dim, str) else self.head_dim(module)
        head_dim = told if isinstance(told, int) else round(told**-2)
        dispatcher = at(module, self.inner) if self.inner else module
        check_projection(f"{name}.{self.output}", output)
        features, hidden = weight_shape(output) if is_conv1d(output) else reversed(weight_shape(output))
        kv_features = features if self.kv_heads is None else self.kv_heads(module) * head_dim
        head_map = head_map_of(dispatcher, features, kv_features, head_dim, name)
        inputs = self.layout(module)(f"{name}.{self.fused}", fused, head_map, head_dim)
        out = contiguous_heads("output", f"{name}.{self.output}", output, head_map.query_heads, head_dim)
        kind: Kind = "cross" if getattr(module, "is_cross_attention", False) else "self"
        extras = own_tensors(f"{name}.{self.inner}".strip("."), dispatcher, head_dim)
        return AttentionSite(
            name, module, dispatcher, head_map, head_dim, head_dim, hidden, kind, (*inputs, out), extras, self.windowed,
            cached=self.cached(module),
        )  # fmt: skip

    def after_cut(self, site: AttentionSite, head_map: HeadMap, kept: tuple[int, ...]) -> None:
        set_head_counts(site.dispatcher, head_map, site.head_dim)
        self.after(site, head_map, kept)
        if not head_map.query_heads:
            output = None if self.inner else self.output
            empty(site.dispatcher, output, self.emptied) if self.emptied else empty_alike(site.dispatcher, output)

    def beside_cut(self, site: AttentionSite) -> None:
        self.beside(site)


def in_groups(module: Foreign) -> bool:
    return hasattr(module, "num_key_value_heads")


def phi3_after(site: AttentionSite, head_map: HeadMap, kept: tuple[int, ...]) -> None:
    # Its forward reads the number of query heads from the model's config.
    follow_groups(site.module, head_map, num_attention_heads=head_map.query_heads)


def phi3_beside(site: AttentionSite) -> None:
    # Where layers differ, transformers warns of a number that is read from the whole's config; torch.compile cannot trace that.
    follow_groups(site.module, site.head_map, num_attention_heads=site.head_map.query_heads)


def query_features_in(attribute: str) -> Callable[[AttentionSite, HeadMap, tuple[int, ...]], None]:
    """For a forward that splits the queries off by this attribute."""

    def after(site: AttentionSite, head_map: HeadMap, kept: tuple[int, ...]) -> None:
        setattr(site.module, attribute, head_map.query_heads * site.head_dim)
        follow_groups(site.module, head_map)

    return after


def positions_after(site: AttentionSite, head_map: HeadMap, kept: tuple[int, ...]) -> None:
    remember_positions(site.module, site.head_map.query_heads, kept)
    specialise(site.module, OwnPositions)


def codegen_after(site: AttentionSite, head_map: HeadMap, kept: tuple[int, ...]) -> None:
    """The features that are left are shared out anew among the four blocks."""
    fused: Foreign = site.projection("query").module
    roles: tuple[Role, ...] = ("query", "key", "value")
    left = torch.cat([site.projection(role).features[list(kept)].flatten() for role in roles])
    wanted = torch.cat([part.features.flatten() for part in quarters("", fused, head_map, site.head_dim)])
    order = torch.empty_like(wanted)
    order[wanted] = left.argsort().argsort()  # where each lies now: they are in their old order
    for parameter in fused.parameters():
        parameter.data = parameter.data[order.to(parameter.device)]
    specialise(site.module, QuarteredHeads)


def width_after(site: AttentionSite, head_map: HeadMap, kept: tuple[int, ...]) -> None:
    specialise(site.dispatcher, OwnWidth if site.dispatcher is not site.module else OwnWidthProjected)


def falcon_after(site: AttentionSite, head_map: HeadMap, kept: tuple[int, ...]) -> None:
    module: Foreign = site.module
    remember_positions(module, site.head_map.query_heads, kept)
    if not module.new_decoder_architecture:
        specialise(module, OwnPositions)
        return
    query, key = places_in_groups(head_map)
    module.query_places, module.key_places = tuple(query), tuple(key[kv] for kv in head_map.kv_of_query)
    specialise(module, GroupedFalcon)


def is_bloom(module: Foreign) -> bool:
    if not hasattr(module, "slow_but_exact"):
        return False
    if module.pretraining_tp > 1 and module.slow_but_exact:
        raise UnsupportedModel("BLOOM's slow_but_exact forward slices weights by the original width; set slow_but_exact=False.")
    return True


def is_deberta(module: Foreign) -> bool:
    if any(getattr(module.self, mix, None) is not None for mix in ("head_logits_proj", "head_weights_proj")):
        raise UnsupportedModel(
            "DeBERTa's talking heads mix all heads with each other: cutting heads would differ from gating them."
        )
    return isinstance(getattr(module.self, "q_bias", None), Tensor)


def deberta_layout(module: Foreign) -> Layout:
    """Positions have projections of their own, which the query and the key of the same head read."""
    positions: tuple[tuple[Role, str], ...] = (("key", "pos_proj"), ("query", "pos_q_proj"))
    there = [(role, part) for role, part in positions if hasattr(module.self, part)]

    def with_positions(name: str, fused: Foreign, head_map: HeadMap, head_dim: int) -> tuple[ProjectionHeads, ...]:
        around = name.rpartition(".")[0]
        more = (
            contiguous_heads(role, f"{around}.{part}", getattr(module.self, part), head_map.query_heads, head_dim)
            for role, part in there
        )
        return *per_head(name, fused, head_map, head_dim), *more

    return with_positions


def takes_width_of_states(module: Foreign) -> bool:
    """Told by its parts and by the arguments of the forward that it had at first."""
    inner: Foreign = getattr(module, "attention", module)
    projected = ["qkv", "attn_drop", "proj", "proj_drop"]
    arguments = [*inspect.signature(forward_of(inner)).parameters][1:]
    parts = [name for name, _ in inner.named_children()]
    known = (projected, ["hidden_states"]) if inner is module else (projected[:2], ["hidden_states", "output_attentions"])
    return (parts, arguments) == known and hasattr(inner, "num_heads")


def is_gpt2(module: Foreign) -> bool:
    return is_conv1d(module.c_attn) and hasattr(module, "split_size")


def is_openai(module: Foreign) -> bool:
    return is_gpt2(module) and hasattr(module, "n_head") and not hasattr(module, "head_dim")


def openai_head_dim(module: Foreign) -> int:
    """Without heads it cannot be told from the weights."""
    known: int | None = getattr(module, "headprune_head_dim", None)
    return known or weight_shape(module.c_proj)[0] // module.n_head


def openai_after(site: AttentionSite, head_map: HeadMap, kept: tuple[int, ...]) -> None:
    module: Foreign = site.module
    module.headprune_head_dim = site.head_dim


def gpt2_layout(module: Foreign) -> Layout:
    """Cross attention has its queries in a layer of their own."""
    if not hasattr(module, "q_attn"):
        return blocks

    def cross(name: str, fused: Foreign, head_map: HeadMap, head_dim: int) -> tuple[ProjectionHeads, ...]:
        query = contiguous_heads("query", f"{name.rpartition('.')[0]}.q_attn", module.q_attn, head_map.query_heads, head_dim)
        return query, *key_value_blocks(name, fused, head_map, head_dim)

    return cross


def granite_speech_layout(module: Foreign) -> Layout:
    """Queries in a layer of their own; positions are embedded in one head's width, for all heads."""

    def apart(name: str, fused: Foreign, head_map: HeadMap, head_dim: int) -> tuple[ProjectionHeads, ...]:
        query = contiguous_heads("query", f"{name.rpartition('.')[0]}.to_q", module.to_q, head_map.query_heads, head_dim)
        return query, *key_value_blocks(name, fused, head_map, head_dim)

    return apart


def falcon_layout(module: Foreign) -> Layout:
    return per_group if module.new_decoder_architecture else blocks if module.multi_query else per_head


def falcon_cached(module: Foreign) -> CachedFeatures | None:
    """With groups it hands the cache a key and a value for every query head."""
    return CachedFeatures(query_head=2 * module.head_dim) if module.new_decoder_architecture else None


def falcon_kv_heads(module: Foreign) -> int:
    many: int = module.num_kv_heads
    return many if module.new_decoder_architecture or not module.multi_query else 1


register_adapter(Fused("gpt2", "c_attn", "c_proj", "head_dim", is_gpt2, gpt2_layout))
register_adapter(
    Fused(
        "phi3", "qkv_proj", "o_proj", "head_dim", in_groups, lambda module: blocks,
        kv_heads=lambda module: module.num_key_value_heads, after=phi3_after, beside=phi3_beside,
    )
)  # fmt: skip
register_adapter(
    Fused(
        "gpt_bigcode", "c_attn", "c_proj", "head_dim", lambda module: hasattr(module, "kv_dim") and not hasattr(module, "q_attn"),
        lambda module: blocks if module.multi_query else per_head,
        kv_heads=lambda module: 1 if module.multi_query else module.num_heads, after=query_features_in("embed_dim"),
    )
)  # fmt: skip
register_adapter(
    Fused(
        "mpt", "Wqkv", "out_proj", "head_dim", lambda module: hasattr(module, "clip_qkv") and not in_groups(module),
        lambda module: blocks, after=positions_after,
    )
)  # fmt: skip
register_adapter(
    Fused(
        "dbrx", "Wqkv", "out_proj", "head_dim", lambda module: hasattr(module, "clip_qkv") and in_groups(module),
        lambda module: blocks, kv_heads=lambda module: module.num_key_value_heads, after=query_features_in("hidden_size"),
    )
)  # fmt: skip
register_adapter(Fused("modernbert", "Wqkv", "Wo", "head_dim", lambda module: hasattr(module, "config"), lambda module: blocks))
register_adapter(
    Fused("gpt_neox", "query_key_value", "dense", "head_size", lambda module: hasattr(module, "config"), lambda module: per_head)
)
register_adapter(
    Fused("deberta_v1", "self.in_proj", "output.dense", "self.attention_head_size", is_deberta, deberta_layout, inner="self")
)
register_adapter(
    Fused(
        "layoutlm_v2", "self.qkv_linear", "output.dense", "self.attention_head_size",
        lambda module: hasattr(module.self, "has_spatial_attention_bias"), lambda module: blocks, after=positions_after,
        emptied=None, inner="self",
    )
)  # fmt: skip
register_adapter(
    Fused(
        "granite_speech", "to_kv", "to_out", "dim_head", lambda module: hasattr(module, "to_q") and hasattr(module, "rel_pos_emb"),
        granite_speech_layout, emptied=EmptiedGraniteSpeech,
    )
)  # fmt: skip
register_adapter(
    Fused(
        "timesformer", "attention.qkv", "output.dense", "attention.scale", takes_width_of_states, lambda module: blocks,
        after=width_after, emptied=None, inner="attention", windowed=True,
    )
)  # fmt: skip
register_adapter(Fused("mgp_str", "qkv", "proj", "scale", takes_width_of_states, lambda module: blocks, after=width_after))
register_adapter(
    Fused(
        "gpt_neox_japanese", "query_key_value", "dense", "head_size", lambda module: hasattr(module, "dense_bias"),
        lambda module: per_head, emptied=EmptiedWithBias,
    )
)  # fmt: skip
register_adapter(
    Fused(
        "persimmon", "query_key_value", "dense", "head_dim", lambda module: hasattr(module, "qk_layernorm"), lambda module: per_head
    )
)
register_adapter(
    Fused(
        "openai-gpt", "c_attn", "c_proj", openai_head_dim, is_openai, lambda module: blocks,
        after=openai_after, emptied=EmptiedOpenAI, cached=lambda module: CachedFeatures(),
    )
)  # fmt: skip
register_adapter(
    Fused(
        "codegen", "qkv_proj", "out_proj", "head_dim", lambda module: hasattr(module, "pos_embd_dim"), lambda module: quarters,
        after=codegen_after,
    )
)  # fmt: skip
register_adapter(
    Fused(
        "bark", "att_proj", "out_proj", "head_dim", lambda module: hasattr(module, "embed_dim"), lambda module: blocks,
        after=query_features_in("embed_dim"),
    )
)  # fmt: skip
register_adapter(
    Fused(
        "bloom", "query_key_value", "dense", "head_dim", is_bloom, lambda module: per_head,
        after=positions_after, emptied=EmptiedBloom,
    )
)  # fmt: skip
register_adapter(
    Fused(
        "falcon", "query_key_value", "dense", "head_dim", lambda module: hasattr(module, "new_decoder_architecture"),
        falcon_layout, kv_heads=falcon_kv_heads, after=falcon_after, runs_ragged=True,
        cached=falcon_cached,
    )
)  # fmt: skip
