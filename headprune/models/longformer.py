"""Longformer: query, key and value once for all tokens and once more for those with global attention."""

from __future__ import annotations

from headprune.head_map import HeadMap
from headprune.models.adapters import register_adapter
from headprune.models.bert import Named
from headprune.models.longformer_forward import EmptiedLongformer, OwnLongformer
from headprune.models.site import AttentionSite, Foreign, Role, at
from headprune.models.specialise import specialise

GLOBAL: tuple[tuple[Role, str], ...] = (("query", "query_global"), ("key", "key_global"), ("value", "value_global"))


class Longformer(Named):
    """Its forward takes the width of all heads from the states."""

    def site(self, name: str, module: Foreign) -> AttentionSite | None:
        return super().site(name, module) if at(module, f"{self.inner}.query_global") is not None else None

    def after_cut(self, site: AttentionSite, head_map: HeadMap, kept: tuple[int, ...]) -> None:
        specialise(site.dispatcher, OwnLongformer)
        super().after_cut(site, head_map, kept)


register_adapter(
    Longformer(
        "longformer", ("self.query", "self.key", "self.value", "output.dense"), "self",
        tuple((role, f"self.{part}") for role, part in GLOBAL), "head_dim", emptied=EmptiedLongformer,
    )
)  # fmt: skip
