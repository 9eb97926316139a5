"""Parakeet's encoder and those like it (Nemotron ASR, Canary, Cohere ASR): positions have a key projection of their own, and each
head a bias for what is said and one for where."""

from __future__ import annotations

from dataclasses import replace

from headprune.models.adapters import register_adapter
from headprune.models.separate import BESIDES, INPUTS, Separate, unknown_parameters
from headprune.models.site import AttentionSite, Foreign, HeadTensor, contiguous_heads

POSITIONS = "relative_k_proj"
BIASES = ("bias_u", "bias_v")  # [heads, head_dim]


class Parakeet(Separate):
    """With one key/value head for each query head."""

    name = "parakeet"

    def site(self, name: str, module: Foreign) -> AttentionSite | None:
        known = hasattr(module, POSITIONS) and all(bias in module._parameters for bias in BIASES)
        found = self.laid_out(name, module) if known else None
        if found is None or found.head_map.kv_heads != found.head_map.query_heads:
            return None
        positions = contiguous_heads(
            "key", f"{name}.{POSITIONS}", getattr(module, POSITIONS), found.head_map.kv_heads, found.head_dim
        )
        beside = {*INPUTS[0], "o_proj", POSITIONS, *BIASES, *BESIDES}
        return replace(
            found, projections=(*found.projections, positions), proven=not unknown_parameters(module, beside),
            extras=(*found.extras, *(HeadTensor(f"{name}.{bias}", module, bias) for bias in BIASES)),
        )  # fmt: skip


register_adapter(Parakeet())
