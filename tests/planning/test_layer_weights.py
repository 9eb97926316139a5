import pytest
import torch

from headprune.errors import InvalidInput
from headprune.head_map import HeadMap
from headprune.planning import Budget
from headprune.planning.layer_weights import search_layer_weights
from headprune.scoring import HeadScores, SiteShape


def scores_of(layers: int, heads: int = 8, least: float = 0.0) -> HeadScores:
    shape = SiteShape(HeadMap.uniform(heads, 4), 8, 8, 32, 40, 20)
    values = {f"layer{index}": torch.arange(heads) + 1.0 + 0.01 * index + least for index in range(layers)}
    return HeadScores("by hand", values, dict.fromkeys(values, shape))


def far_from(wanted: list[int]):
    """Plans -> how far their head counts are from `wanted`; and the plans seen."""
    seen = []

    def error(plans):
        seen.extend(plans)
        return [float(sum(abs(len(heads) - want) for heads, want in zip(plan.values(), wanted))) for plan in plans]

    return error, seen


@pytest.mark.parametrize("wanted", [[1, 2, 5, 8], [8, 5, 2, 1], [6, 2, 6, 2]])
@pytest.mark.parametrize("least", [0.0, -20.0])
def test_the_search_comes_within_a_head_of_what_each_layer_can_spare(wanted, least):
    error, seen = far_from(wanted)
    scores = scores_of(4, least=least)
    found = search_layer_weights(scores, Budget(heads=0.5), error, trials=120)
    assert [len(heads) for heads in found.plan.values()] == list(found.best.kept)
    assert found.trials[0].kept == (4, 4, 4, 4)
    assert found.best.error <= 2.0 < found.trials[0].error  # one head in the wrong layer
    assert len(seen) == len(found.trials) == len({tuple(plan.values()) for plan in seen}) <= 120
    assert found.plan.scores is scores
    for heads in found.plan.values():  # within a layer the lowest scores go
        assert heads == tuple(range(8 - len(heads), 8))


def test_a_layer_without_heads_stops_no_search():
    error, _ = far_from([0, 2, 6])
    empty = SiteShape(HeadMap((), 0), 8, 8, 32, 40, 20)
    scores = scores_of(3)
    scores = HeadScores("by hand", {**scores, "layer0": torch.zeros(0)}, {**scores.shapes, "layer0": empty})
    assert search_layer_weights(scores, Budget(heads=0.5), error, trials=20).best.kept[0] == 0


def test_every_plan_that_is_tried_keeps_the_budget_and_the_constraints():
    error, seen = far_from([2, 2, 8, 8])
    budget = Budget(params=0.4)
    search_layer_weights(scores_of(4), budget, error, trials=12, granularity="kv_group", protect={"layer0": [0]}, min_heads=2)
    full = sum(budget.cost(shape, shape.head_map) for shape in seen[0].shapes.values())
    assert len(seen) > 4
    for plan in seen:
        assert sum(budget.cost(plan.shapes[name], plan.head_map(name)) for name in plan) <= 0.6 * full
        assert 0 in plan["layer0"]
        assert all(len(heads) >= 2 and plan.head_map(name).is_uniform for name, heads in plan.items())


def test_no_more_is_tried_than_asked_for():
    error, seen = far_from([1, 2, 5, 8])
    assert len(search_layer_weights(scores_of(4), Budget(heads=0.5), error, trials=1).trials) == len(seen) == 1
    with pytest.raises(InvalidInput, match="trials is 0"):
        search_layer_weights(scores_of(4), Budget(heads=0.5), error, trials=0)


def test_an_allocation_on_which_weights_have_no_effect_is_refused():
    with pytest.raises(InvalidInput, match="every layer loses the same share; take another allocation"):
        search_layer_weights(scores_of(3), Budget(heads=0.5), far_from([1, 2, 5])[0], allocation="uniform")


def test_an_error_that_is_no_number_is_refused():
    with pytest.raises(InvalidInput, match="error of a plan is NaN"):
        search_layer_weights(scores_of(3), Budget(heads=0.5), lambda plans: [float("nan") for _ in plans])


def test_a_search_prints_its_plan_and_what_the_trials_won():
    error, _ = far_from([1, 2, 5, 8])
    found = search_layer_weights(scores_of(4), Budget(heads=0.5), error, trials=12)
    first, *rest, last = str(found).splitlines()
    assert "\n".join([first, *rest]) == str(found.plan)
    assert last.startswith(f"{len(found.trials)} plans tried, the best with error {found.best.error:.4g}, by scores alone ")
