"""The tables that the command line prints."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text
from torch import nn

from headprune.models import attention_sites
from headprune.models.name_cell import NameCell
from headprune.nn.replace import own_attention
from headprune.surgery.record import record_of


def sites_table(model: nn.Module) -> Table:
    """Every attention of `model`: kind, head map, sizes, parameters of its heads, and which heads of the original are there."""
    pruned = bool(record_of(model).get("sites"))
    table = Table(title=type(model).__name__, title_justify="left")
    for column in ("attention", "kind"):
        table.add_column(column)
    for column in ("query\nheads", "kv\nheads", "head\ndim", "parameters"):
        table.add_column(column, justify="right", no_wrap=True)
    for column in ("group\nsizes", "■ there,\n· gone")[: 1 + pruned]:
        table.add_column(column, overflow="fold")
    for row in site_rows(model):
        sizes, original = row["group_sizes"], row["original_query_heads"]
        groups = f"{sizes[0]} each" if sizes and len(set(sizes)) == 1 else " ".join(map(str, sizes)) or "none"
        heads = f"{row['query_heads']}/{original}" if pruned else str(row["query_heads"])
        counts = (heads, str(row["kv_heads"]), str(row["head_dim"]), f"{row['parameters']:,}")
        table.add_row(
            NameCell(row["attention"]), row["kind"], *counts, groups, *([head_row(original, row["kept"])] if pruned else [])
        )
    return table


def site_rows(model: nn.Module) -> list[dict[str, Any]]:
    """What `sites_table` shows, as plain data; kept numbers the heads as in the unpruned original."""
    recorded = record_of(model).get("sites", {})
    rows = []
    with own_attention(model):
        sites = attention_sites(model)
    for site in sites:
        entry = recorded.get(site.name)
        original = len(entry["original"]["kv_of_query"]) if entry else site.head_map.query_heads
        rows.append(
            {
                "attention": site.name, "kind": site.kind, "query_heads": site.head_map.query_heads,
                "original_query_heads": original, "kept": entry["kept"] if entry else list(range(original)),
                "kv_heads": site.head_map.kv_heads, "group_sizes": list(site.head_map.group_sizes), "head_dim": site.head_dim,
                "parameters": site.parameters(),
            }
        )  # fmt: skip
    return rows


def head_row(heads: int, kept: Collection[int]) -> Text:
    """A filled square for a head that is there, a dot for one that is gone."""
    row = Text()
    for head in range(heads):
        row.append("■" if head in kept else "·", style="green" if head in kept else "dim")
    return row


CHECKS = {
    "cut_equals_gated": "cut model = dense model with those heads gated to zero (largest relative difference)",
    "reload": "loaded from disk = in memory (largest relative difference)",
    "generates_as_gated": "greedy generation with a cache: the same tokens cut and gated",
}


def check_rows(checks: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(what was checked, what was found) of a run's checks."""
    return [(CHECKS.get(name, name), checked(found)) for name, found in checks.items()]


def checked(found: Any) -> str:
    if isinstance(found, bool):
        return "yes" if found else "no"
    return f"{found:.1e}" if isinstance(found, float) else str(found)


def run_tables(result: Any) -> list[RenderableType]:
    """What a finished run shows: the plan, what was measured, what was checked and where everything is."""
    checks = Table(title="checks", title_justify="left", show_header=False)
    for row in check_rows(result.checks):
        checks.add_row(*row)
    where = f"the run, with the pruned model: {result.folder}; its report: {result.report}"
    return [result.plan, checks, result.comparison, result.stages, where]
