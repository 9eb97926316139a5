import pytest
from next_token import NextToken
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
    assert found.__rich__().row_count == 3


def test_budgets_are_checked_before_anything_is_measured():
    model = llama()
    scores = score(model, criterion="random")
    with pytest.raises(InvalidInput, match="at least one budget"):
        sweep(model, NextToken(), scores, [])
    with pytest.raises(InfeasibleBudget):
        sweep(model, NextToken(), scores, [Budget(heads=0.5), Budget(heads=0.95)])
