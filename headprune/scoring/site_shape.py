"""The geometry of one attention site, apart from its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from headprune.head_map import HeadMap
from headprune.models.cached import CachedFeatures
from headprune.models.site import AttentionSite


@dataclass(frozen=True)
class SiteShape:
    """What plans and budgets need to know of a site; all sizes in features or parameters."""

    head_map: HeadMap
    head_dim: int
    value_dim: int
    hidden_size: int
    query_head_parameters: int  # go with each query head
    kv_head_parameters: int  # go with each key/value head
    output_bias: bool = False  # whether the output projection has a bias, which can take up a mean
    cached: CachedFeatures | None = field(default=None, compare=False)  # as in AttentionSite; older files say it of decoders alone
    gate_width: int = 0  # as in AttentionSite
    own_keys: bool = True  # as in AttentionSite
    keys_in_window: int | None = field(default=None, compare=False)  # as in AttentionSite; older files do not say it

    @classmethod
    def of(cls, site: AttentionSite) -> SiteShape:
        parameters = (site.parameters_per_head(False), site.parameters_per_head(True))
        biased = getattr(site.output.module, "bias", None) is not None
        return cls(
            site.head_map, site.head_dim, site.value_dim, site.hidden_size, *parameters, biased, site.cached, site.gate_width,
            site.own_keys, site.keys_in_window,
        )  # fmt: skip

    def parameters(self, head_map: HeadMap) -> int:
        return head_map.query_heads * self.query_head_parameters + head_map.kv_heads * self.kv_head_parameters

    @property
    def cache(self) -> CachedFeatures:
        return self.cached or CachedFeatures(kv_head=self.head_dim + self.value_dim)

    def to_json(self) -> dict[str, Any]:
        content = {field.name: getattr(self, field.name) for field in fields(self)}
        content["cached"] = None if self.cached is None else asdict(self.cached)
        return {**content, "head_map": self.head_map.to_json()}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> SiteShape:
        cached = content.get("cached")
        parts = {"head_map": HeadMap.from_json(content["head_map"]), "cached": None if cached is None else CachedFeatures(**cached)}
        return cls(**{**content, **parts})
