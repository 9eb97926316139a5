"""Mean and spread by method and fraction, and who is first, as Markdown and JSON beside the result file."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from quality.methods import methods


def cells_of(rows: Iterable[dict[str, Any]]) -> dict[str, dict[float, dict[str, dict[str, Any]]]]:
    """model -> fraction -> method -> {mean, spread (standard deviation over seeds), seeds, heads_kept, ...} or {refused}."""
    gathered: dict[str, dict[float, dict[str, list]]] = {}
    for row in rows:
        if row["method"] != "dense":
            gathered.setdefault(row["model"], {}).setdefault(row["heads"], {}).setdefault(row["method"], []).append(row)
    return {
        model: {fraction: {name: cell(some) for name, some in by_method.items()} for fraction, by_method in sorted(found.items())}
        for model, found in gathered.items()
    }


def cell(rows: list[dict[str, Any]]) -> dict[str, Any]:
    measured = [row for row in rows if "refused" not in row]
    if not measured:
        return {"refused": rows[0]["refused"]}
    values = [row["of_dense"] for row in measured]
    timed = [sum(row["cpu_seconds"].values()) for row in measured if "cpu_seconds" in row]
    return {
        "mean": statistics.fmean(values),
        "spread": statistics.stdev(values) if len(values) > 1 else None,
        "seeds": len(values),
        "heads_kept": sum(measured[0]["kept"]),
        "cpu_seconds": statistics.fmean(timed) if timed else None,
        "peak_mb": max(row["peak_mb"] for row in measured),
    }


def first_of(found: dict[str, dict[str, Any]], higher_is_better: bool) -> str | None:
    """The method with the best mean, of those that were measured."""
    measured = {name: one["mean"] for name, one in found.items() if "mean" in one}
    return (max if higher_is_better else min)(measured, key=measured.__getitem__, default=None)


def write_summary(rows: Iterable[dict[str, Any]], output: Path) -> str:
    """Writes <output>.summary.json and <output>.md; gives the latter's text."""
    rows = list(rows)
    dense = {row["model"]: row for row in rows if row["method"] == "dense"}
    cells = cells_of(rows)
    document, parts = {}, []
    for model, by_fraction in cells.items():
        better = dense[model]["higher_is_better"]
        firsts = {fraction: first_of(found, better) for fraction, found in by_fraction.items()}
        document[model] = {str(fraction): {"first": firsts[fraction], "methods": found} for fraction, found in by_fraction.items()}
        parts.append(table(model, dense[model], by_fraction, firsts))
    text = "\n\n".join(parts) + "\n"
    output.with_suffix(".summary.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    output.with_suffix(".md").write_text(text, encoding="utf-8")
    return text


def table(model: str, dense: dict[str, Any], by_fraction: dict[float, dict[str, dict]], firsts: dict[float, str | None]) -> str:
    metric, value = dense["headline"], dense["quality"][dense["headline"]]
    direction = "higher" if dense["higher_is_better"] else "lower"
    heads = sum(dense["kept"])
    lines = [
        f"**{model}**, {dense['task']}: {metric} over that of the dense model ({value:.4f}), {direction} is better; mean ± "
        f"standard deviation over calibration draws (their number where it is not 3); {heads} heads. Bold: first.",
        "",
        f"| method | {' | '.join(f'{fraction:.0%} removed' for fraction in by_fraction)} | processor s | peak MB |",
        f"| --- |{' ---: |' * (len(by_fraction) + 2)}",
    ]
    reasons = []
    for name, method in sorted(methods().items(), key=lambda item: item[0].startswith("ours")):
        row = {fraction: found[name] for fraction, found in by_fraction.items() if name in found}
        if not row:
            continue
        shown = [shown_cell(row.get(one), one, heads, firsts[one] == name, method.seeded) for one in by_fraction]
        measured = [one for one in row.values() if "mean" in one]
        seconds = max((one["cpu_seconds"] for one in measured if one["cpu_seconds"] is not None), default=None)
        seconds = "" if seconds is None else f"{seconds:.0f}"
        peak = f"{max(one['peak_mb'] for one in measured):.0f}" if measured else ""
        lines.append(f"| {method.label} | {' | '.join(shown)} | {seconds} | {peak} |")
        reasons += sorted({f"{method.label}: {one['refused']}" for one in row.values() if "refused" in one})
    return "\n".join([*lines, *(["", *(f"- {reason}" for reason in reasons)] if reasons else [])])


def shown_cell(one: dict[str, Any] | None, fraction: float, heads: int, first: bool, seeded: bool) -> str:
    if one is None:
        return "not measured"
    if "refused" in one:
        return "cannot"
    text = f"{one['mean']:.3f}"
    text = f"**{text}**" if first else text
    if one["spread"] is not None:
        text += f" ± {one['spread']:.3f}"
    if one["seeds"] != 3 and seeded:
        text += f" ({one['seeds']})"
    budget = heads - int(fraction * heads + 1e-9)
    return text if one["heads_kept"] == budget else f"{text} [keeps {one['heads_kept']} of {budget}]"
