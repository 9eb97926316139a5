"""Longformer and LED: query, key and value once for all tokens and once more for those with global attention; and the decoders of
LED and TrOCR."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace

from headprune.head_map import HeadMap
from headprune.models.adapters import register_adapter
from headprune.models.bert import Named
from headprune.models.emptied_form import forward_of
from headprune.models.led_forward import EmptiedLedDecoder, OwnLedDecoder, OwnTrOCR
from headprune.models.longformer_forward import EmptiedLongformer, OwnLongformer
from headprune.models.site import AttentionSite, Foreign, Role, at
from headprune.models.specialise import specialise

GLOBAL: tuple[tuple[Role, str], ...] = (("query", "query_global"), ("key", "key_global"), ("value", "value_global"))
ARGUMENTS = ("hidden_states", "key_value_states", "past_key_values", "attention_mask", "output_attentions")


class Longformer(Named):
    """Its forward takes the width of all heads from the states."""

    def site(self, name: str, module: Foreign) -> AttentionSite | None:
        return super().site(name, module) if at(module, f"{self.inner}.query_global") is not None else None

    def after_cut(self, site: AttentionSite, head_map: HeadMap, kept: tuple[int, ...]) -> None:
        specialise(site.dispatcher, OwnLongformer)
        super().after_cut(site, head_map, kept)


@dataclass(frozen=True)
class LedDecoder(Named):
    """It too; told by its parts and by the arguments of the forward that it had at first. more_arguments: behind those of LED's."""

    more_arguments: tuple[str, ...] = ()
    own: type = OwnLedDecoder

    def site(self, name: str, module: Foreign) -> AttentionSite | None:
        if hasattr(module, "config") or not all(hasattr(module, part) for part in ("embed_dim", "out_proj", "scaling")):
            return None
        given = [*inspect.signature(forward_of(module)).parameters][1:]
        if given != [*ARGUMENTS, *self.more_arguments]:
            return None
        site = super().site(name, module)
        return site if site is None or not name.endswith("encoder_attn") else replace(site, kind="cross")

    def after_cut(self, site: AttentionSite, head_map: HeadMap, kept: tuple[int, ...]) -> None:
        specialise(site.module, self.own)
        super().after_cut(site, head_map, kept)


INNER = "longformer_self_attn"
register_adapter(
    Longformer(
        "led", (f"{INNER}.query", f"{INNER}.key", f"{INNER}.value", "output"), INNER,
        tuple((role, f"{INNER}.{part}") for role, part in GLOBAL), "head_dim", emptied=EmptiedLongformer,
    )
)  # fmt: skip
register_adapter(
    LedDecoder("led_decoder", ("q_proj", "k_proj", "v_proj", "out_proj"), head_dim="head_dim", emptied=EmptiedLedDecoder)
)
register_adapter(
    LedDecoder("trocr", ("q_proj", "k_proj", "v_proj", "out_proj"), head_dim="head_dim", more_arguments=("kwargs",), own=OwnTrOCR)
)
register_adapter(
    Longformer(
        "longformer", ("self.query", "self.key", "self.value", "output.dense"), "self",
        tuple((role, f"self.{part}") for role, part in GLOBAL), "head_dim", emptied=EmptiedLongformer,
    )
)  # fmt: skip
