import io
from dataclasses import replace

import pytest
from next_token import NextToken
from rich.console import Console
from tiny_models import llama

from headprune.errors import InfeasibleBudget, InvalidInput
from headprune.planning import Budget
from headprune.scoring import score
from headprune.sweep import Sweep, sweep


def test_a_sweep_leaves_the_model_dense_and_marks_the_pareto_front(tmp_path):
    model, task = llama(), NextToken()
    found = sweep(model, task, score(model, criterion="magnitude_l2"), [Budget(heads=0.25), Budget(heads=0.5)], repeats=1)
    assert [sum(point.kept.values()) for point in found.points] == [16, 12, 8]
    assert found.points[0].evaluation.quality == task.evaluate(model)
    sizes = [point.evaluation.parameters for point in found.points]
    assert sizes == sorted(sizes, reverse=True)
    assert found.points[-1].pareto  # nothing is smaller
    assert found.points[0].latency_share == 1.0
    assert all(point.latency_share > 0 for point in found.points)
    found.save(tmp_path / "sweep.json")
    assert Sweep.load(tmp_path / "sweep.json") == found
    assert [table.row_count for table in found.__rich__().renderables] == [3, 3]


def shown(table):
    console = Console(width=80, file=io.StringIO())
    console.print(table)
    return console.file.getvalue()


def test_a_table_of_80_columns_shows_budgets_whole_and_no_ratio_to_a_quality_of_0():
    model, task = llama(), NextToken()
    found = sweep(model, task, score(model, criterion="magnitude_l2"), [Budget(heads=0.25)], repeats=1)
    none = dict.fromkeys(found.points[0].evaluation.quality, 0.0)
    points = tuple(replace(point, evaluation=replace(point.evaluation, quality=none)) for point in found.points)
    text = shown(replace(found, points=points))
    assert "heads=0.25 *" in text
    assert "nan" not in text


def test_a_table_of_80_columns_shows_the_heads_of_many_layers_in_few_lines():
    model, task = llama(), NextToken()
    found = sweep(model, task, score(model, criterion="magnitude_l2"), [Budget(kv_cache=0.25)], repeats=1)
    kept = {f"layers.{number}": 10 + number % 30 for number in range(80)}
    points = tuple(replace(point, kept=kept) for point in found.points)
    text = shown(replace(found, points=points)).partition("heads kept by layer")[2]
    assert len(text.splitlines()) < 20
    assert [word for word in text.split() if word.isdigit()] == 2 * [str(count) for count in kept.values()]


def test_budgets_are_checked_before_anything_is_measured():
    model = llama()
    scores = score(model, criterion="random")
    with pytest.raises(InvalidInput, match="at least one budget"):
        sweep(model, NextToken(), scores, [])
    with pytest.raises(InfeasibleBudget):
        sweep(model, NextToken(), scores, [Budget(heads=0.5), Budget(heads=0.95)])
