"""diffusers' attention of two streams of tokens (Stable Diffusion 3, Flux), each with projections of its own: pictures and text
are projected apart, attend together, and are projected apart again. Of one stream too, where queries and keys are normed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from headprune.head_map import HeadMap
from headprune.models.adapters import head_map_of, register_adapter
from headprune.models.emptied import Emptied, EmptiedAlone, projected
from headprune.models.guessed import Guessed
from headprune.models.quantised import weight_shape
from headprune.models.site import AttentionSite, Foreign, Kind, ProjectionHeads, Role, at, contiguous_heads, heads_at
from headprune.models.specialise import empty

Part = tuple[Role, str]  # what a linear layer gives, and where it is in the attention
# Of the first stream, then of the second; of the last attention's second stream nobody reads the output.
PARTS: tuple[Part, ...] = (
    ("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("output", "to_out.0"),
    ("query", "add_q_proj"), ("key", "add_k_proj"), ("value", "add_v_proj"), ("output", "to_add_out"),
)  # fmt: skip
NORMS = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")
KNOWN = {path.partition(".")[0] for _, path in PARTS} | {*NORMS}


class Joint(Guessed):
    """A head owns features in the projections of both streams. Like attention that is only guessed it is cut where a forward pass
    proves it: what joins the streams (the `processor`) is not read."""

    name = "joint"
    guesses = False

    def site(self, name: str, module: Foreign) -> AttentionSite | None:
        parts = parts_of(module, PARTS)
        if [path for _, path in parts[:4]] != [path for _, path in PARTS[:4]]:
            return None
        head_dim, joined = head_dim_of(module), any(path == "add_q_proj" for _, path in parts)
        if head_dim is None or not (joined or norms_of(module)):
            return None
        (hidden, features), keys = weight_shape(at(module, "to_out.0")), weight_shape(module.to_k)[0]
        head_map = head_map_of(module, features, keys, head_dim, name)
        kind: Kind = "cross" if getattr(module, "is_cross_attention", False) else "self"
        projections = projections_of(name, module, parts, head_map, head_dim)
        return AttentionSite(name, module, module, head_map, head_dim, head_dim, hidden, kind, projections, proven=False)

    def empty(self, module: Foreign, output: str) -> None:
        empty(module, output, EmptiedJoint)


class JoinedWithFeedForward(Guessed):
    """A block of one stream, whose heads share the output projection with a feed-forward (Flux)."""

    name = "joined_with_feed_forward"
    guesses = False

    def site(self, name: str, module: Foreign) -> AttentionSite | None:
        attention: Foreign = getattr(module, "attn", None)
        output: Foreign = getattr(module, "proj_out", None)
        parts = parts_of(attention, PARTS[:3])
        if len(parts) < 3 or at(attention, "to_out.0") is not None or not isinstance(output, nn.Linear):
            return None
        head_dim = head_dim_of(attention)
        if head_dim is None:
            return None
        features = weight_shape(attention.to_q)[0]
        head_map = head_map_of(attention, features, weight_shape(attention.to_k)[0], head_dim, name)
        own = heads_at("output", f"{name}.proj_out", output, head_map.query_heads, head_dim)
        beside = torch.arange(head_map.query_heads * head_dim, weight_shape(output)[1], device="cpu")
        projections = (*projections_of(f"{name}.attn", attention, parts, head_map, head_dim), replace(own, beside=beside))
        return AttentionSite(
            name, module, attention, head_map, head_dim, head_dim, weight_shape(output)[0], "self", projections, proven=False
        )  # fmt: skip

    def empty(self, module: Foreign, output: str) -> None:
        empty(module, None, EmptiedAlone)


def parts_of(module: Foreign, parts: Sequence[Part]) -> list[Part]:
    return [(role, path) for role, path in parts if isinstance(at(module, path), nn.Linear)]


def norms_of(module: nn.Module) -> list[nn.Parameter]:
    norms = (getattr(module, norm, None) for norm in NORMS)
    return [parameter for norm in norms if norm is not None for parameter in norm.parameters()]


def head_dim_of(module: Foreign) -> int | None:
    """None where something in `module` is not known, or its norms are not of single heads."""
    unknown = [name for name, _ in module.named_parameters() if name.partition(".")[0] not in KNOWN]
    if unknown or getattr(module, "fused_projections", False) or not isinstance(getattr(module, "heads", None), int):
        return None
    head_dim: int = getattr(module, "headprune_head_dim", None) or weight_shape(module.to_q)[0] // module.heads
    return head_dim if all(weight.shape == (head_dim,) for weight in norms_of(module)) else None


def projections_of(
    name: str, module: Foreign, parts: Sequence[Part], head_map: HeadMap, head_dim: int
) -> tuple[ProjectionHeads, ...]:
    heads: dict[Role, int] = {"key": head_map.kv_heads, "value": head_map.kv_heads}
    return tuple(
        contiguous_heads(role, f"{name}.{path}", at(module, path), heads.get(role, head_map.query_heads), head_dim)
        for role, path in parts
    )


class EmptiedJoint(Emptied):
    """Gives both streams their output biases."""

    to_out: nn.Module
    add_q_proj: nn.Module | None
    to_add_out: nn.Module | None

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        output = projected(self.to_out, hidden_states.new_zeros(*hidden_states.shape[:-1], 0))
        if encoder_hidden_states is None or getattr(self, "add_q_proj", None) is None:
            return output
        added = encoder_hidden_states.new_zeros(*encoder_hidden_states.shape[:-1], 0)
        return output, added if self.to_add_out is None else self.to_add_out(added)


register_adapter(Joint())
register_adapter(JoinedWithFeedForward())
