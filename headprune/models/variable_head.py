"""Our own VariableHeadAttention: the way into the house for models built on torch.nn.MultiheadAttention."""

from __future__ import annotations

from torch import nn

from headprune.errors import UnsupportedModel
from headprune.head_map import HeadMap
from headprune.models.adapters import register_adapter
from headprune.models.site import AttentionSite, contiguous_heads
from headprune.nn import VariableHeadAttention


class VariableHead:
    name = "variable_head"
    runs_ragged = True

    def site(self, name: str, module: nn.Module) -> AttentionSite | None:
        if isinstance(module, nn.MultiheadAttention):
            raise UnsupportedModel(
                f"{name} (MultiheadAttention) is torch's own attention, whose heads cannot be cut singly. Call "
                "headprune.nn.replace_multihead_attention(model) first: same weights, same outputs."
            )
        if not isinstance(module, VariableHeadAttention):
            return None
        heads = {"q": module.num_heads, "k": module.num_kv_heads, "v": module.num_kv_heads, "out": module.num_heads}
        projections = tuple(
            contiguous_heads(role, f"{name}.{short}_proj", getattr(module, f"{short}_proj"), heads[short], module.head_dim)
            for role, short in zip(("query", "key", "value", "output"), heads)
        )
        # Nothing in the layer tells; torch.nn.TransformerDecoderLayer calls its cross attention so.
        cross = name.endswith("multihead_attn") or not module.embed_dim == module.kdim == module.vdim
        head_dim = module.head_dim
        return AttentionSite(
            name, module, module, module.head_map, head_dim, head_dim, module.embed_dim, "cross" if cross else "self", projections
        )

    def cut(self, site: AttentionSite, kept: tuple[int, ...]) -> None:
        site.module.prune(kept)

    def after_cut(self, site: AttentionSite, head_map: HeadMap, kept: tuple[int, ...]) -> None:
        """Nothing is left to do: `prune` keeps the layer in order."""


register_adapter(VariableHead())
