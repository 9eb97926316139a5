"""The numbers of a report, as one JSON document: what the web page embeds and the figures draw."""

from __future__ import annotations

import math
from dataclasses import asdict
from itertools import takewhile
from typing import Any

import torch

from headprune.files import SCHEMA_VERSION, finite
from headprune.planning import PruningPlan
from headprune.report.budget_steps import BudgetSteps, Keep, budget_steps
from headprune.report.run_folder import RunFolder
from headprune.scoring import HeadScores
from headprune.scoring.stability import unsettled_heads

Json = dict[str, Any]


def page_data(run: RunFolder) -> Json:
    """Lists over sites and heads are in the model's order; nothing in it is NaN or infinite (null instead)."""
    steps = budget_steps(run)
    plan = run.plan
    whole: Json = finite({
        "task": run.comparison.task if run.comparison else (run.recipe.get("task") or {}).get("name"),
        "model": run.recipe.get("model") or run.folder.resolve().name,
        "sites": sites(run),
        "criteria": [criterion(name, scores) for name, scores in run.scores.items()],
        "plan": None if plan is None else bits(run, plan.keep),
        "unsettled": unsettled(run),
        "steps": steps_json(run, steps),
        "measured": measured(run),
        "metrics": metrics(run),
        "counted": counted(run),
        "sensitivity": sensitivity(run),
        "agreement": agreement(run),
        "portraits": None if run.portraits is None else [run.portraits.to_json().get(name) for name in run.shapes],
        "plan_document": plan_document(run),
    })  # fmt: skip
    return whole


def sites(run: RunFolder) -> list[Json]:
    """Each attention's name, a short label, and the sizes that costs are counted from."""
    labels = short_labels(list(run.shapes))
    return [
        {
            "name": name, "label": labels[name],
            "kv_of_query": list(shape.head_map.kv_of_query), "kv_heads": shape.head_map.kv_heads, "head_dim": shape.head_dim,
            "value_dim": shape.value_dim, "hidden_size": shape.hidden_size,
            "query_head_parameters": shape.query_head_parameters, "kv_head_parameters": shape.kv_head_parameters,
        }
        for name, shape in run.shapes.items()
    ]  # fmt: skip


def short_labels(names: list[str]) -> dict[str, str]:
    """What of each name differs from the others: "model.layers.3.self_attn" -> "3"."""
    if len(names) < 2:
        return {name: name for name in names}
    parts = [name.split(".") for name in names]
    front, back = common_start(parts), common_start([part[::-1] for part in parts])
    return {name: ".".join(part[front : len(part) - back]) or name for name, part in zip(names, parts)}


def common_start(rows: list[list[str]]) -> int:
    """How many first elements are the same in all rows."""
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, zip(*rows)))


def criterion(name: str, scores: HeadScores) -> Json:
    """percentile: of each score among all heads of the model, in [0, 1], as the printed heat map has it."""
    everything = torch.cat([torch.zeros(0), *(scores[site] for site in scores if site not in scores.unreached)])
    values, ranks, spread = [], [], []
    for site in scores:
        reached = site not in scores.unreached
        values.append(scores[site].tolist() if reached else None)
        ranks.append([float((everything < score).float().mean()) for score in scores[site]] if reached else None)
        spread.append(scores.spread[site].tolist() if reached and scores.spread is not None else None)
    return {"name": name, "scores": values, "percentile": ranks, "spread": spread}


def bits(run: RunFolder, keep: Keep) -> list[str]:
    """One text a site: "1" for a head that stays, "0" for one that goes."""
    kept = {name: set(heads) for name, heads in keep.items()}
    return ["".join("01"[head in kept[name]] for head in range(shape.head_map.query_heads)) for name, shape in run.shapes.items()]


def everything(run: RunFolder) -> Keep:
    return {name: tuple(range(shape.head_map.query_heads)) for name, shape in run.shapes.items()}


def unsettled(run: RunFolder) -> list[list[int]]:
    """Per site the heads that other calibration samples might put on the cut's other side."""
    found = {}
    if run.plan is not None and run.ranking is not None:
        found = unsettled_heads(run.ranking, run.plan.keep)
    return [list(found.get(name, ())) for name in run.shapes]


def steps_json(run: RunFolder, steps: BudgetSteps) -> Json:
    listed = [{"fraction": fraction, "keep": bits(run, keep)} for fraction, keep in steps.steps.items()]
    return {"quantity": steps.quantity, "allocation": steps.allocation, "note": steps.note, "list": listed}


def metrics(run: RunFolder) -> Json | None:
    """The metric that stands for quality, and which way it is better."""
    source = run.comparison.to_json() if run.comparison else run.sweep
    return None if source is None else {name: source[name] for name in ("headline", "higher_is_better")}


def measured(run: RunFolder) -> list[Json]:
    """The models that were really measured; latency_share: against the dense model of the same run."""
    points = []
    if run.comparison is not None and run.plan is not None:
        pair = run.comparison.to_json()
        for name, keep in {"dense": everything(run), "pruned": run.plan.keep}.items():
            points.append(point(name, "run", pair[name], pair["dense"]) | {"keep": bits(run, keep), "chosen": name == "pruned"})
    swept = (run.sweep or {}).get("points", ())
    for one in swept:
        label = ", ".join(f"{name} {share:.0%} away" for name, share in list(one["budget"].items())[:1])
        found = point(label, "sweep", one["evaluation"], swept[0]["evaluation"])
        if one.get("latency_share") is not None:  # timed in turn with the dense model, unlike the milliseconds of two points
            found["latency_share"] = one["latency_share"]
        points.append(found | {"counts": [one["kept"].get(name) for name in run.shapes], "chosen": False})
    return points


def point(label: str, source: str, found: Json, dense: Json) -> Json:
    wanted = ("quality", "parameters", "attention_flops", "kv_cache_bytes_per_token", "latency_p50_ms", "latency_p95_ms")
    latency, reference = found["latency_p50_ms"], dense["latency_p50_ms"]
    return {"label": label, "source": source, "latency_share": latency / reference if reference else None} | {
        name: found[name] for name in wanted
    }


def counted(run: RunFolder) -> Json | None:
    """What the dense model costs by count, where an evaluation says so."""
    if run.comparison is not None:
        dense = asdict(run.comparison.dense)
    elif run.sweep is not None:
        dense = run.sweep["points"][0]["evaluation"]
    else:
        return None
    return {name: dense[name] for name in ("parameters", "attention_flops", "sequence_length", "kv_cache_bytes_per_token")}


def sensitivity(run: RunFolder) -> Json | None:
    """increase: per site (null where not measured) the loss above the dense one with 0, 1, 2, ... heads of `order` gone."""
    found = run.sensitivity
    if found is None:
        return None
    curves = [found.curves.get(name) for name in run.shapes]
    return {
        "criterion": found.criterion, "samples": found.samples, "dense": found.dense,
        "order": [list(found.order.get(name, ())) for name in run.shapes],
        "increase": [None if curve is None else [loss - found.dense for loss in curve] for curve in curves],
    }  # fmt: skip


def agreement(run: RunFolder) -> Json | None:
    """Matrices over the criteria; overlap: of the heads that each would keep, as many as the plan does."""
    names = list(run.scores)
    if len(names) < 2:
        return None
    plan = run.plan
    keep = 0.5 if plan is None else max(1 / plan.total_heads, 1 - plan.removed_heads / plan.total_heads)
    found = [[run.scores[one].compare(run.scores[other], keep) for other in names] for one in names]
    return {
        "criteria": names, "keep": keep, "spearman": [[one.spearman for one in row] for row in found],
        "overlap": [[one.overlap for one in row] for row in found],
    }  # fmt: skip


def plan_document(run: RunFolder) -> Json:
    """The plan.json that an edit starts from: the run's own, or one that keeps all."""
    plan = run.plan
    if plan is None:
        ranking = next(iter(run.scores.values()))
        plan = PruningPlan(everything(run), run.shapes, None, ranking.criterion, ranking, ranking.made_for)
    document = {"kind": "pruning_plan", "schema_version": SCHEMA_VERSION, **plan.to_json()}
    values = [site.get(part) or [] for site in document["sites"].values() for part in ("scores", "spread")]
    if not all(map(math.isfinite, (value for part in values for value in part))):  # JSON has no infinity
        for site in document["sites"].values():
            site.pop("scores", None), site.pop("spread", None)
    return document
