"""The slider's steps are the planner's own plans."""

from dataclasses import replace

import pytest
from reported_run import batches, write_run
from tiny_models import llama

from headprune.planning import Budget, PruningPlan, Sensitivity, plan
from headprune.report.budget_steps import budget_steps
from headprune.report.run_folder import read_run
from headprune.scoring import score


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    write_run(folder)
    return read_run(folder)


def test_every_step_is_the_plan_of_its_budget(run):
    steps = budget_steps(run)
    assert (steps.quantity, steps.allocation, steps.note) == ("heads", "global", "")
    assert len(steps.steps) == 15  # 16 heads; each of two attentions keeps one, so that 15 of 16 cannot go
    for fraction, keep in steps.steps.items():
        assert keep == plan(run.ranking, Budget(heads=fraction)).keep


def test_thirds_of_the_heads_are_whole_budgets_too(tmp_path):
    """0.083333 of 24 heads is one, and 2/24 are two."""
    scores = score(llama(layers=3), batches(), "fisher")
    scores.save(tmp_path / "scores.json")
    steps = budget_steps(read_run(tmp_path)).steps
    assert len(steps) == 22
    for fraction, keep in steps.items():
        assert keep == plan(scores, Budget(heads=fraction)).keep


def test_the_recipes_options_are_kept_to(run):
    first = next(iter(run.plan))
    options = {"allocation": "uniform", "granularity": "kv_group", "protect": {first: [0]}}
    steps = budget_steps(replace(run, recipe={"plan": options}))
    assert steps.allocation == "uniform"
    assert all(0 in keep[first] for keep in steps.steps.values())
    by_planner = [keep for fraction, keep in steps.steps.items() if fraction != 0.5]  # there the run's own plan stands
    assert all(len(heads) % 2 == 0 for keep in by_planner for heads in keep.values())


def test_curves_that_the_run_did_not_plan_by_move_no_step(run):
    """A run measures them for its report alone."""
    order = {name: tuple(found.argsort().tolist()) for name, found in run.ranking.items()}
    steep, flat = (tuple(1 + slope * gone for gone in range(9)) for slope in (1.0, 0.0))
    curves = Sensitivity(run.ranking.criterion, 4, 1.0, order, dict(zip(order, (flat, steep))))
    steps = budget_steps(replace(run, recipe={"plan": {"allocation": "optimal"}}, sensitivity=curves))
    for fraction, keep in steps.steps.items():
        if fraction != run.plan.budget.fraction:
            assert keep == plan(run.ranking, Budget(heads=fraction), allocation="optimal").keep


def test_a_plan_by_hand_stands_at_its_share_of_heads(run):
    keep = dict.fromkeys(run.plan, (3,))
    by_hand = PruningPlan(keep, run.plan.shapes, None, "fisher", run.ranking)
    assert budget_steps(replace(run, plan=by_hand)).steps[14 / 16] == keep


def test_a_budget_that_cannot_be_repeated_becomes_one_of_heads_and_says_so(run):
    steps = budget_steps(replace(run, plan=replace(run.plan, budget=Budget(latency=0.3))))  # plan.json keeps no latency table
    assert steps.quantity == "heads"
    assert "cannot be repeated" in steps.note
    assert steps.steps[0.5] == run.plan.keep


def test_without_scores_there_is_only_the_plan(run):
    steps = budget_steps(replace(run, scores={}, plan=replace(run.plan, scores=None)))
    assert steps.steps == {0.5: run.plan.keep}
    assert "no order" in steps.note
