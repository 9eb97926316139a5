"""What a plan takes out of a model, by count."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rich.table import Table
from torch import nn

from headprune.head_map import HeadMap
from headprune.models.site import AttentionSite


@dataclass(frozen=True)
class Savings:
    """Each number before and after: distinct parameters of the whole model; FLOPs (2 per multiply-add) of the attention
    projections and bytes of key/value cache (in the dtype of the weights), both per token."""

    head_maps: dict[str, tuple[HeadMap, HeadMap]]
    parameters: tuple[int, int]
    projection_flops: tuple[int, int]
    cache_bytes: tuple[int, int]

    @classmethod
    def of(cls, model: nn.Module, sites: Mapping[str, AttentionSite], kept: Mapping[str, tuple[int, ...]]) -> Savings:
        """For `sites` of `model` of which those in `kept` keep these query heads alone."""
        maps = {name: (site.head_map, site.head_map) for name, site in sites.items()}
        maps |= {name: (sites[name].head_map, sites[name].head_map.keep(heads)) for name, heads in kept.items()}
        whole = sum(parameter.numel() for parameter in model.parameters())
        owned, cached = ([0, 0], [0, 0])
        for name, site in sites.items():
            for index, head_map in enumerate(maps[name]):
                owned[index] += site.parameters(head_map)
                cached[index] += site.cache.of(head_map) * site.output.module.weight.element_size()
        return cls(maps, (whole, whole - owned[0] + owned[1]), (2 * owned[0], 2 * owned[1]), tuple(cached))

    @property
    def query_heads(self) -> tuple[int, int]:
        before, after = (sum(pair[index].query_heads for pair in self.head_maps.values()) for index in (0, 1))
        return before, after

    def rows(self) -> dict[str, tuple[int, int]]:
        return {
            "query heads": self.query_heads,
            "parameters of the model": self.parameters,
            "FLOPs per token in the attention projections": self.projection_flops,
            "bytes of key/value cache per token": self.cache_bytes,
        }

    def __str__(self) -> str:
        totals = [f"{name}: {before:,} -> {after:,}" for name, (before, after) in self.rows().items()]
        sites = [f"  {name}: {before} -> {after}" for name, (before, after) in self.head_maps.items() if before != after]
        return "\n".join([*totals, *sites])

    def __rich__(self) -> Table:
        table = Table(title="what goes", title_justify="left")
        for column in ("", "before", "after", "saved"):
            table.add_column(column, justify="right" if column else "left", overflow="fold")
        for name, (before, after) in self.rows().items():
            table.add_row(name, f"{before:,}", f"{after:,}", f"{1 - after / before:.1%}" if before else "")
        for name, (before, after) in self.head_maps.items():
            if before != after:
                table.add_row(name, str(before), str(after), f"{1 - after.query_heads / before.query_heads:.1%}")
        return table
