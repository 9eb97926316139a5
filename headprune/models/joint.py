"""diffusers' attention of two streams of tokens (Stable Diffusion 3, Flux), each with projections of its own: pictures and text
are projected apart, attend together, and are projected apart again. Of one stream too, where queries and keys are normed."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from headprune.models.adapters import head_map_of, register_adapter
from headprune.models.emptied import Emptied, projected
from headprune.models.guessed import Guessed
from headprune.models.quantised import weight_shape
from headprune.models.site import AttentionSite, Foreign, Kind, Role, at, contiguous_heads
from headprune.models.specialise import empty

# Of the first stream, then of the second; of the last attention's second stream nobody reads the output.
PARTS: tuple[tuple[Role, str], ...] = (
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
        parts = [(role, path) for role, path in PARTS if isinstance(at(module, path), nn.Linear)]
        holding = {child for child, held in module.named_children() if any(True for _ in held.parameters())}
        more = holding & {*NORMS, "add_q_proj"}
        if [path for _, path in parts[:4]] != [path for _, path in PARTS[:4]] or not more or holding - KNOWN:
            return None
        (hidden, features), keys = weight_shape(at(module, "to_out.0")), weight_shape(module.to_k)[0]
        head_dim = getattr(module, "headprune_head_dim", None) or features // module.heads
        norms = [parameter for norm in holding & {*NORMS} for parameter in getattr(module, norm).parameters()]
        if getattr(module, "fused_projections", False) or any(weight.shape != (head_dim,) for weight in norms):
            return None
        head_map = head_map_of(module, features, keys, head_dim, name)
        heads: dict[Role, int] = {"key": head_map.kv_heads, "value": head_map.kv_heads}
        projections = tuple(
            contiguous_heads(role, f"{name}.{path}", at(module, path), heads.get(role, head_map.query_heads), head_dim)
            for role, path in parts
        )
        kind: Kind = "cross" if getattr(module, "is_cross_attention", False) else "self"
        return AttentionSite(name, module, module, head_map, head_dim, head_dim, hidden, kind, projections, proven=False)

    def empty(self, module: Foreign, output: str) -> None:
        empty(module, output, EmptiedJoint)


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
