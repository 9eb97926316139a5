"""The criteria, from their registry: by what they read, with what that is, their docstrings, costs and sources."""

from __future__ import annotations

import inspect
import re
from dataclasses import fields

import headprune as hp
from headprune.scoring import SiteObservations
from headprune.scoring.streamed import BY_LAYER

from .registry import generator, plain, table


def by_needs() -> dict[tuple[str, ...], list]:
    """The needs that criteria have, as names, those of data-free ones first -> the criteria that have exactly these."""
    order = [need.value for need in hp.Need]
    groups: dict[tuple[str, ...], list] = {}
    for found in hp.criteria().values():
        groups.setdefault(tuple(sorted((need.value for need in found.needs), key=order.index)), []).append(found)
    return dict(sorted(groups.items(), key=lambda item: (len(item[0]), [order.index(name) for name in item[0]])))


@generator("criteria-overview")
def overview() -> str:
    rows = [
        [f"[`{found.name}`](#{found.name})", ", ".join(f"`{name}`" for name in needs) or "nothing", plain(found.cost)]
        for needs, group in by_needs().items()
        for found in group
    ]
    return table(["criterion", "reads", "cost"], rows)


@generator("not-streamed")
def not_streamed() -> str:
    """Criteria that cannot be read layer by layer."""
    names = [f"[`{name}`](criteria.md#{name})" for name, found in hp.criteria().items() if found.needs - BY_LAYER]
    return ", ".join(names) + "."


@generator("criteria")
def criteria() -> str:
    parts = []
    for needs, group in by_needs().items():
        parts.append(f"## Reads {' and '.join(f'`{name}`' for name in needs) or 'nothing'}")
        parts += [observed(needs[0])] if len(needs) == 1 else []
        parts += [section(found) for found in group]
    return "\n\n".join(parts)


def section(found) -> str:
    body = "\n\n".join(plain(paragraph) for paragraph in inspect.getdoc(found.function).split("\n\n"))
    return f"### `{found.name}` {{ #{found.name} }}\n\n{body}\n\n*Cost*: {plain(found.cost)}. *Source*: {plain(found.source)}."


def observed(need: str) -> str:
    """What of SiteObservations the need fills, as its docstring tells it."""
    filled = {one.name for one in fields(SiteObservations) if one.metadata and one.metadata["need"].value == need}
    told = re.split(r"\n(?=\S[^:\n]*: )", inspect.getdoc(SiteObservations).replace("\n\n", "\n"))
    lines = [re.split(r": ", entry, maxsplit=1) for entry in told if filled & set(re.split(r", ", entry.split(": ")[0]))]
    return "\n".join(f"- `{names}`: {plain(text)}" for names, text in lines)
