"""Steps of a schedule, told in the original's heads and by the original's cost."""

import pytest
import torch

from headprune.head_map import HeadMap
from headprune.planning import Budget, plan
from headprune.schedules.composition import composed, protected_now, relative_budget, removed_fraction
from headprune.scoring import HeadScores, SiteShape


def shapes(heads: int, parameters: int) -> dict[str, SiteShape]:
    return {"a": SiteShape(HeadMap.uniform(heads), 8, 8, 32, parameters, 0)}


@pytest.mark.parametrize("parameters", [1, 3, 12_345_677, 10**12 + 39])
@pytest.mark.parametrize("quantity", ["heads", "params"])
def test_a_step_takes_what_is_to_go_of_the_original_and_nothing_more(quantity, parameters):
    """Whatever has gone already, and whatever a float makes of the fraction of what is left."""
    for left in (48, 41, 37, 29, 23):
        for gone in range(48 - left, 47):
            budget = relative_budget(Budget(**{quantity: 0.5}), gone / 48, shapes(48, parameters), shapes(left, parameters))
            scores = HeadScores("test", {"a": torch.arange(float(left))}, shapes(left, parameters))
            assert left - plan(scores, budget).removed_heads == 48 - gone


def test_heads_are_told_in_the_originals_numbers():
    earlier = {"a": (0, 2, 3, 7), "b": (1, 4)}
    assert composed(earlier, {"a": (1, 3)}) == {"a": (2, 7), "b": (1, 4)}
    assert protected_now({"a": [3, 0], "b": None}, earlier) == {"a": [2, 0], "b": None}
    assert protected_now("b", earlier) == {"b": None}
    original = {"a": shapes(8, 5)["a"], "b": shapes(8, 5)["a"]}
    assert removed_fraction(Budget(heads=0.5), original, earlier) == 10 / 16
