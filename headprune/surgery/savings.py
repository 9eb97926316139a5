"""What a plan takes out of a model, by count."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rich.table import Table
from torch import nn

from headprune.head_map import HeadMap
from headprune.models.caching import caching_sites
from headprune.models.name_cell import NameCell
from headprune.models.site import AttentionSite


@dataclass(frozen=True)
class Savings:
    """Each number before and after: distinct parameters of the whole model; FLOPs (2 per multiply-add) of the attention
    projections and bytes of key/value cache (in the dtype of the weights), both per token; cache_bytes is None where nothing is
    cached (encoders)."""

    head_maps: dict[str, tuple[HeadMap, HeadMap]]
    parameters: tuple[int, int]
    projection_flops: tuple[int, int]
    cache_bytes: tuple[int, int] | None

    @classmethod
    def of(cls, model: nn.Module, sites: Mapping[str, AttentionSite], kept: Mapping[str, tuple[int, ...]]) -> Savings:
        """For `sites` of `model` of which those in `kept` keep these query heads alone."""
        maps = {name: (site.head_map, site.head_map) for name, site in sites.items()}
        maps |= {name: (sites[name].head_map, sites[name].head_map.keep(heads)) for name, heads in kept.items()}
        owned = [sum(site.parameters(maps[name][index]) for name, site in sites.items()) for index in (0, 1)]
        whole, caching = count_parameters(model), caching_sites(model, sites.values())
        cached = [sum(cached_bytes(site, maps[site.name][index]) for site in caching) for index in (0, 1)]
        held = (cached[0], cached[1]) if caching else None
        return cls(maps, (whole, whole - owned[0] + owned[1]), (2 * owned[0], 2 * owned[1]), held)

    @classmethod
    def between(cls, before: nn.Module, after: nn.Module, sites: Mapping[str, tuple[AttentionSite, AttentionSite]]) -> Savings:
        """For two models that have the same attentions; `sites` holds each as it is in both."""
        maps = {name: (first.head_map, second.head_map) for name, (first, second) in sites.items()}
        old, new = [first for first, _ in sites.values()], [second for _, second in sites.values()]
        flops = (2 * sum(site.parameters() for site in old), 2 * sum(site.parameters() for site in new))
        caching = [sites[site.name] for site in caching_sites(before, old)]
        cached = [sum(cached_bytes(pair[index], pair[index].head_map) for pair in caching) for index in (0, 1)]
        held = (cached[0], cached[1]) if caching else None
        return cls(maps, (count_parameters(before), count_parameters(after)), flops, held)

    @property
    def query_heads(self) -> tuple[int, int]:
        before, after = (sum(pair[index].query_heads for pair in self.head_maps.values()) for index in (0, 1))
        return before, after

    def rows(self) -> dict[str, tuple[int, int]]:
        rows = {
            "query heads": self.query_heads,
            "parameters of the model": self.parameters,
            "FLOPs per token in the attention projections": self.projection_flops,
            "bytes of key/value cache per token": self.cache_bytes,
        }
        return {name: pair for name, pair in rows.items() if pair is not None}

    def to_json(self) -> dict[str, dict[str, int] | None]:
        pairs = {
            "query_heads": self.query_heads, "parameters": self.parameters, "projection_flops_per_token": self.projection_flops,
            "cache_bytes_per_token": self.cache_bytes,
        }  # fmt: skip
        return {name: None if pair is None else {"before": pair[0], "after": pair[1]} for name, pair in pairs.items()}

    def totals(self) -> list[str]:
        return [f"{name}: {before:,} -> {after:,}" for name, (before, after) in self.rows().items()]

    def __str__(self) -> str:
        sites = [f"  {name}: {before} -> {after}" for name, (before, after) in self.head_maps.items() if before != after]
        return "\n".join([*self.totals(), *sites])

    def __rich__(self) -> Table:
        table = self.table("what goes")
        for name, (before, after) in self.head_maps.items():
            if before != after:
                table.add_row(*self.site_row(name))
        return table

    def table(self, title: str, *more: str) -> Table:
        """The totals, with further columns left empty; `site_row` gives a row for one attention."""
        table = Table(title=title, title_justify="left")
        for column in ("", "before", "after", "saved", *more):
            table.add_column(column, justify="right" if column in ("before", "after", "saved") else "left", overflow="fold")
        for name, (before, after) in self.rows().items():
            table.add_row(name, f"{before:,}", f"{after:,}", saved(before, after))
        return table

    def site_row(self, name: str) -> tuple[NameCell, str, str, str]:
        before, after = self.head_maps[name]
        return NameCell(name), str(before), str(after), saved(before.query_heads, after.query_heads)


def saved(before: int, after: int) -> str:
    return f"{1 - after / before:.1%}" if before else ""


def count_parameters(model: nn.Module) -> int:
    """Distinct parameters of the whole model."""
    return sum(parameter.numel() for parameter in model.parameters())


def cached_bytes(site: AttentionSite, head_map: HeadMap) -> int:
    width: int = site.output.module.weight.element_size()
    return site.cache.of(head_map) * width
