"""ProphetNet: `query_proj`, `key_proj`, `value_proj`, `out_proj`; the decoder's attention to itself runs several streams of tokens,
with relative positions for each head."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from headprune.head_map import HeadMap
from headprune.models.adapters import register_adapter
from headprune.models.bert import Named
from headprune.models.own_positions import remember_positions
from headprune.models.prophetnet_forward import EmptiedNgram, EmptiedProphetNet, OwnNgram, OwnProphetNet
from headprune.models.site import AttentionSite, Foreign
from headprune.models.specialise import specialise
from headprune.nn.replace import register_own_forward

PROJECTIONS = ("query_proj", "key_proj", "value_proj", "out_proj")


def has_streams(module: Foreign) -> bool:
    return hasattr(module, "ngram") and isinstance(getattr(module, "relative_pos_embeddings", None), nn.Linear)


@dataclass(frozen=True)
class ProphetNet(Named):
    """streams: whether it is the attention with several."""

    streams: bool = False

    def site(self, name: str, module: Foreign) -> AttentionSite | None:
        known = hasattr(module, "num_attn_heads") and has_streams(module) == self.streams
        return super().site(name, module) if known else None

    def after_cut(self, site: AttentionSite, head_map: HeadMap, kept: tuple[int, ...]) -> None:
        module: Foreign = site.module
        if self.streams:  # its relative positions stay those of all heads
            remember_positions(module, site.head_map.query_heads, kept)
        else:
            module.num_attn_heads = head_map.query_heads
        specialise(module, OwnNgram if self.streams else OwnProphetNet)
        super().after_cut(site, head_map, kept)


@register_own_forward
def own_forward(module: nn.Module) -> Callable[[], None] | None:
    """The stock one projects its streams one after the other, so that a head's output is there in two pieces."""
    if not has_streams(module) or isinstance(module, (OwnNgram, EmptiedNgram)):
        return None
    stock = type(module)
    specialise(module, OwnNgram)

    def undo() -> None:
        if not hasattr(module, "position_heads"):  # heads that are gone stay so
            module.__class__ = stock

    return undo


register_adapter(ProphetNet("prophetnet", PROJECTIONS, head_dim="head_dim", emptied=EmptiedProphetNet))
register_adapter(ProphetNet("prophetnet_streams", PROJECTIONS, head_dim="head_dim", emptied=EmptiedNgram, streams=True))
