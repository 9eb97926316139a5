"""The table of peers, as Markdown: what each gives, or why there is nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peers.registry import Peer

NOTHING = "–"
STAGES = {"install": "is not installed", "import": "does not start", "run": "fails"}


def markdown(rows: list[dict[str, Any]], peers: Mapping[str, Peer]) -> str:
    """A table for each model, the peers that ran first; below it the others with their errors, each once."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    parts = [table([row for row in rows if row["model"] == model], peers) for model in models]
    return "\n\n".join([*parts, *[one for one in (without_heads(rows, peers),) if one]]) + "\n"


def table(rows: list[dict[str, Any]], peers: Mapping[str, Peer]) -> str:
    dense = next(row for row in rows if row["peer"] == "dense")
    ran = [row for name in peers for row in rows if row["peer"] == name and "quality" in row]
    timed = any("scoring" in row for row in ran)
    decoder = any(row.get("generates") for row in ran)
    heads, direction = sum(dense["query_heads"]), "higher" if dense["higher_is_better"] else "lower"
    columns = [
        "package", "heads left", "of dense", *(["score and cut, s"] if timed else []), "peak MB", "saves and loads",
        *(["generates"] if decoder else []),
    ]  # fmt: skip
    lines = [
        f"**{dense['model']}**, {dense['task']}: {dense['headline']} over that of the dense model ({dense['quality']:.4f}), "
        f"{direction} is better; {rows[-1]['heads']:.0%} of {heads} heads to remove, no training.",
        "",
        f"| {' | '.join(columns)} |",
        f"| --- |{' ---: |' * (len(columns) - 1)}",
    ]
    for row in ran:
        seconds = f"{row['scoring']['seconds'] + row['cutting']['seconds']:.0f}" if "scoring" in row else NOTHING
        cells = [
            label(row, peers), f"{sum(row['query_heads'])}", f"{row['quality'] / dense['quality']:.3f}",
            *([seconds] if timed else []),
            f"{row['peak_mb']:.0f}", row["kept"], *([row["generates"] or NOTHING] if decoder else []),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    notes = [f"- {label(row, peers)}: {note}." for row in ran for note in row.get("notes", ())]
    failed = [row for name in peers for row in rows if row["peer"] == name and "failed" in row]
    return "\n".join(
        [*lines, *([""] if failed or notes else []), *notes, *(f"- {label(row, peers)} {failure(row)}" for row in failed)]
    )


def label(row: dict[str, Any], peers: Mapping[str, Peer]) -> str:
    """Name and versions."""
    peer, found = peers[row["peer"]], row.get("versions", {})
    own = found.get(peer.package)
    others = ", ".join(f"{name} {found[name]}" for name in ("transformers", "torch") if found.get(name) and name != peer.package)
    return f"{peer.name} {own}{f' ({others})' if others else ''}" if own else peer.name


def failure(row: dict[str, Any]) -> str:
    return f"{STAGES[row['stage']]}: `{row['failed']}`"


def without_heads(rows: list[dict[str, Any]], peers: Mapping[str, Peer]) -> str:
    """Packages that prune, but no heads."""
    found = {row["peer"]: row for row in rows if "lacks" in row}
    if not found:
        return ""
    return "\n".join(
        [
            "Said to prune, but with nothing to run (read in the package):",
            "",
            *(f"- {label(row, peers)}: {row['lacks']}" for row in found.values()),
        ]
    )
