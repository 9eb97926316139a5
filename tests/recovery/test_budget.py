"""How long training lasts and how fast it learns on the way."""

import pytest

from headprune.recovery.budget import TrainingBudget


def test_the_rate_warms_up_in_equal_parts_and_falls_to_zero():
    """4 steps of warm-up are a fifth of the rate more at each; what is left of 10 steps scales it down all along."""
    budget = TrainingBudget.of(10, None, 4, 2e-3, None)
    assert budget.peak == 2e-3
    warming = [0.2, 0.4 * 0.9, 0.6 * 0.8, 0.8 * 0.7]
    assert [budget.factor(step, 0.0) for step in range(11)] == pytest.approx([*warming, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0])


def test_the_clock_decides_where_minutes_are_given():
    budget = TrainingBudget.of(None, 2, 0, 1.0, 5)
    assert [budget.factor(step, seconds) for step, seconds in ((0, 0.0), (900, 30.0), (1, 120.0), (2, 500.0))] == [1, 0.75, 0, 0]
    assert budget.max_steps > 10**6


def test_a_rate_of_ones_own_is_taken_as_it_is():
    budget = TrainingBudget.of(10, None, None, lambda step: 0.5**step, None)
    assert (budget.peak, budget.factor(3, 0.0)) == (1.0, 0.125)


@pytest.mark.parametrize(
    ("given", "steps", "warmup"),
    [((None, None, None), 21, 2), ((2000, None, None), 2000, 100), ((5, None, None), 5, 0), ((None, 1, None), None, 20)],
)
def test_what_is_not_given_follows_from_the_data_and_the_length(given, steps, warmup):
    """Three passes of 7 steps; a tenth of the steps to warm up, 100 at most, and 20 where the clock decides."""
    budget = TrainingBudget.of(*given, 1e-3, 7)
    assert (budget.steps, budget.warmup) == (steps, warmup)
