"""The tables that the command line prints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from torch import nn

from headprune.models import attention_sites


def sites_table(model: nn.Module) -> Table:
    """Every attention of `model`: kind, head map, sizes, parameters of its heads."""
    table = Table(title=type(model).__name__, title_justify="left")
    for column in ("attention", "kind", "query heads", "kv heads", "group sizes", "head_dim", "parameters"):
        table.add_column(column, overflow="fold", justify="left" if column in ("attention", "kind", "group sizes") else "right")
    for site in attention_sites(model):
        head_map = site.head_map
        groups = (
            f"{head_map.group_sizes[0]} each"
            if head_map.is_uniform and head_map.kv_heads
            else " ".join(map(str, head_map.group_sizes))
        )
        table.add_row(
            site.name, site.kind, str(head_map.query_heads), str(head_map.kv_heads), groups or "none", str(site.head_dim),
            f"{site.parameters():,}",
        )  # fmt: skip
    return table


CHECKS = {
    "cut_equals_gated": "cut model = dense model with those heads gated to zero (largest relative difference)",
    "reload": "loaded from disk = in memory (largest relative difference)",
    "generates_as_gated": "greedy generation with a cache: the same tokens cut and gated",
}


def check_rows(checks: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(what was checked, what was found) of a run's checks."""
    return [(CHECKS.get(name, name), "yes" if found is True else f"{found:.1e}") for name, found in checks.items()]


def run_tables(result) -> list[RenderableType]:
    """What a finished run shows: the plan, what was measured, what was checked and where everything is."""
    checks = Table(title="checks", title_justify="left", show_header=False)
    for row in check_rows(result.checks):
        checks.add_row(*row)
    return [result.plan, checks, result.comparison, f"the run, with the pruned model: {result.folder}; its report: {result.report}"]
