"""WavLM: `q_proj`, `k_proj`, `v_proj`, `out_proj`, and a gate for each head on the relative positions, which the first layer makes
for all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import nn

from headprune.head_map import HeadMap
from headprune.models.adapters import register_adapter
from headprune.models.bert import Named
from headprune.models.own_positions import remember_positions
from headprune.models.site import AttentionSite, Foreign, HeadTensor
from headprune.models.specialise import specialise
from headprune.models.wavlm_forward import EmptiedWavLM, OwnWavLM
from headprune.nn.replace import register_own_forward

CONSTANT = "gru_rel_pos_const"  # [1, heads, 1, 1]


class WavLM(Named):
    def site(self, name: str, module: Foreign) -> AttentionSite | None:
        site = super().site(name, module) if CONSTANT in module._parameters else None
        return site and replace(site, extras=(HeadTensor(f"{name}.{CONSTANT}", module, CONSTANT, dim=1),))

    def after_cut(self, site: AttentionSite, head_map: HeadMap, kept: tuple[int, ...]) -> None:
        remember_positions(site.module, site.head_map.query_heads, kept)
        if head_map.query_heads:
            specialise(site.module, OwnWavLM)
        super().after_cut(site, head_map, kept)


@register_own_forward
def own_forward(module: nn.Module) -> Callable[[], None] | None:
    if CONSTANT not in module._parameters or isinstance(module, (OwnWavLM, EmptiedWavLM)):
        return None
    stock = type(module)
    specialise(module, OwnWavLM)

    def undo() -> None:
        if not hasattr(module, "position_heads"):  # heads that are gone stay so
            module.__class__ = stock

    return undo


register_adapter(WavLM("wavlm", ("q_proj", "k_proj", "v_proj", "out_proj"), head_dim="head_dim", emptied=EmptiedWavLM))
