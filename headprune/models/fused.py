"""Attention whose query, key and value share one linear layer: GPT-2, Phi-3, MPT, ModernBERT (blocks), GPT-NeoX, BLOOM
(interleaved per head), Falcon (any of them), StarCoder (one key/value head behind all queries, or interleaved), and others like
them. Those of vision models: fused_vision.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from headprune.errors import UnsupportedModel
from headprune.head_map import HeadMap
from headprune.models.adapters import head_map_of, register_adapter
from headprune.models.cached import CachedFeatures
from headprune.models.emptied import Emptied, EmptiedBloom, EmptiedOpenAI, EmptiedWithBias
from headprune.models.fused_layout import blocks, key_value_blocks, per_group, per_head, places_in_groups, quarters
from headprune.models.head_counts import set_head_counts
from headprune.models.layer_config import follow_groups
from headprune.models.own_positions import GroupedFalcon, OwnPositions, remember_positions
from headprune.models.quarters import QuarteredHeads
from headprune.models.site import AttentionSite, Foreign, Kind, ProjectionHeads, Role, check_projection, contiguous_heads, is_conv1d
from headprune.models.specialise import empty, specialise

Layout = Callable[[str, Foreign, HeadMap, int], tuple[ProjectionHeads, ...]]


@dataclass(frozen=True)
class Fused:
    """One fused layout; registered once per kind of module.

    fused, output, head_dim: attributes of the module; head_dim also a function of it. is_kind: tells it from others with the same
    attributes.
    layout: where the heads lie, or a function of the module that tells. kv_heads: key/value heads of a module that was never
    cut; default one per query head. after: what else a cut asks for. emptied: the forward that is left without heads.
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
    emptied: type = Emptied
    runs_ragged: bool = False
    cached: Callable[[Foreign], CachedFeatures | None] = lambda module: None
    windowed: bool = False

    def site(self, name: str, module: Foreign) -> AttentionSite | None:
        attributes = [self.fused, self.output, *([self.head_dim] if isinstance(self.head_dim, str) else [])]
        if not all(hasattr(module, part) for part in attributes) or not self.is_kind(module):
            return None
        head_dim = getattr(module, self.head_dim) if isinstance(self.head_dim, str) else self.head_dim(module)
        output = getattr(module, self.output)
        check_projection(f"{name}.{self.output}", output)
        features, hidden = output.weight.shape if is_conv1d(output) else reversed(output.weight.shape)
        kv_features = features if self.kv_heads is None else self.kv_heads(module) * head_dim
        head_map = head_map_of(module, features, kv_features, head_dim, name)
        inputs = self.layout(module)(f"{name}.{self.fused}", getattr(module, self.fused), head_map, head_dim)
        out = contiguous_heads("output", f"{name}.{self.output}", output, head_map.query_heads, head_dim)
        parts = (*inputs, out)
        kind: Kind = "cross" if getattr(module, "is_cross_attention", False) else "self"
        return AttentionSite(
            name, module, module, head_map, head_dim, head_dim, hidden, kind, parts, windowed=self.windowed,
            cached=self.cached(module),
        )  # fmt: skip

    def after_cut(self, site: AttentionSite, head_map: HeadMap, kept: tuple[int, ...]) -> None:
        set_head_counts(site.module, head_map, site.head_dim)
        self.after(site, head_map, kept)
        if not head_map.query_heads:
            empty(site.module, self.output, self.emptied)


def in_groups(module: Foreign) -> bool:
    return hasattr(module, "num_key_value_heads")


def phi3_after(site: AttentionSite, head_map: HeadMap, kept: tuple[int, ...]) -> None:
    # Its forward reads the number of query heads from the model's config.
    follow_groups(site.module, head_map, num_attention_heads=head_map.query_heads)


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


def is_gpt2(module: Foreign) -> bool:
    return is_conv1d(module.c_attn) and hasattr(module, "split_size")


def is_openai(module: Foreign) -> bool:
    return is_gpt2(module) and hasattr(module, "n_head") and not hasattr(module, "head_dim")


def openai_head_dim(module: Foreign) -> int:
    """Without heads it cannot be told from the weights."""
    known: int | None = getattr(module, "headprune_head_dim", None)
    return known or module.c_proj.weight.shape[0] // module.n_head


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
        kv_heads=lambda module: module.num_key_value_heads, after=phi3_after,
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
