"""FSMT, which translates: `q_proj`, `k_proj`, `v_proj`, `out_proj`, and states with tokens before samples."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from headprune.head_map import HeadMap
from headprune.models.adapters import register_adapter
from headprune.models.bert import Named
from headprune.models.fsmt_forward import EmptiedFsmt, OwnFsmt
from headprune.models.site import AttentionSite, Foreign
from headprune.models.specialise import specialise
from headprune.nn.replace import register_own_forward


class Fsmt(Named):
    def site(self, name: str, module: Foreign) -> AttentionSite | None:
        return super().site(name, module) if is_fsmt(module) else None

    def after_cut(self, site: AttentionSite, head_map: HeadMap, kept: tuple[int, ...]) -> None:
        specialise(site.module, OwnFsmt)
        super().after_cut(site, head_map, kept)


def is_fsmt(module: nn.Module) -> bool:
    return hasattr(module, "encoder_decoder_attention") and hasattr(module, "cache_key")


@register_own_forward
def own_forward(module: nn.Module) -> Callable[[], None] | None:
    if not is_fsmt(module) or isinstance(module, OwnFsmt):
        return None
    stock = type(module)
    specialise(module, OwnFsmt)

    def undo() -> None:
        if not hasattr(module, "head_map"):  # heads that are gone stay so
            module.__class__ = stock

    return undo


register_adapter(Fsmt("fsmt", ("q_proj", "k_proj", "v_proj", "out_proj"), head_dim="head_dim", emptied=EmptiedFsmt))
