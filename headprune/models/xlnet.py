"""XLNet: projections that are parameters [features, heads, head_dim], biases [heads, head_dim] of what a query looks for, and one
embedding of segments per head."""

from __future__ import annotations

from headprune.head_map import HeadMap
from headprune.models.adapters import head_map_of, register_adapter
from headprune.models.cached import CachedFeatures
from headprune.models.head_counts import set_head_counts
from headprune.models.site import AttentionSite, Foreign, HeadTensor, Role, contiguous_heads
from headprune.models.xlnet_layers import is_xlnet, layers_of

ROLES: dict[str, Role] = {"q": "query", "k": "key", "v": "value", "r": "key", "o": "output"}
BIASES = ("r_w_bias", "r_r_bias", "r_s_bias")


class XLNet:
    """Its forward takes the number of heads from the weights, so that a cut module runs the stock one, without heads too; what it
    remembers of earlier tokens are states, which no head owns."""

    name = "xlnet"

    def site(self, name: str, module: Foreign) -> AttentionSite | None:
        if not is_xlnet(module):
            return None
        layers, width = layers_of(module), module.d_head
        features = layers["o"].in_features
        head_map = head_map_of(module, features, features, width, name)
        projections = tuple(
            contiguous_heads(role, f"{name}.{part}", layers[part], head_map.query_heads, width) for part, role in ROLES.items()
        )
        extras = (
            *(HeadTensor(f"{name}.{bias}", module, bias) for bias in BIASES),
            HeadTensor(f"{name}.seg_embed", module, "seg_embed", dim=1),
        )
        return AttentionSite(
            name, module, module, head_map, width, width, module.d_model, "self", projections, extras,
            cached=CachedFeatures(kv_head=0),
        )  # fmt: skip

    def after_cut(self, site: AttentionSite, head_map: HeadMap, kept: tuple[int, ...]) -> None:
        set_head_counts(site.module, head_map, site.head_dim)


register_adapter(XLNet())
