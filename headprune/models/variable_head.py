"""Our own VariableHeadAttention: the way into the house for models built on torch.nn.MultiheadAttention."""

from __future__ import annotations

from torch import nn

from headprune.errors import UnsupportedModel
from headprune.head_map import HeadMap
from headprune.models.adapters import register_adapter
from headprune.models.site import AttentionSite, Foreign, Role, contiguous_heads
from headprune.nn import VariableHeadAttention
from headprune.nn.replace import kept_from_swap


class VariableHead:
    name = "variable_head"
    runs_ragged = True

    def site(self, name: str, module: nn.Module) -> AttentionSite | None:
        if isinstance(module, nn.MultiheadAttention):
            reason = kept_from_swap(module) or (
                "is torch's own attention, whose heads cannot be cut singly. Take what "
                "headprune.nn.replace_multihead_attention(model) returns: same weights, same outputs"
            )
            raise UnsupportedModel(f"{name or 'the model'} ({type(module).__name__}) {reason}.")
        if not isinstance(module, VariableHeadAttention):
            return None
        queries, keys = module.num_heads, module.num_kv_heads
        parts: tuple[tuple[Role, str, int], ...] = (
            ("query", "q_proj", queries), ("key", "k_proj", keys), ("value", "v_proj", keys), ("output", "out_proj", queries),
        )  # fmt: skip
        projections = tuple(
            contiguous_heads(role, f"{name}.{part}", getattr(module, part), heads, module.head_dim) for role, part, heads in parts
        )
        # Nothing in the layer tells; torch.nn.TransformerDecoderLayer calls its cross attention so.
        cross = name.endswith("multihead_attn") or not module.embed_dim == module.kdim == module.vdim
        head_dim = module.head_dim
        return AttentionSite(
            name, module, module, module.head_map, head_dim, head_dim, module.embed_dim, "cross" if cross else "self", projections
        )

    def cut(self, site: AttentionSite, kept: tuple[int, ...]) -> None:
        layer: Foreign = site.module
        layer.prune(kept)

    def after_cut(self, site: AttentionSite, head_map: HeadMap, kept: tuple[int, ...]) -> None:
        """Nothing is left to do: `prune` keeps the layer in order."""


register_adapter(VariableHead())
