"""How much has gone after each step, by the formulas."""

import pytest

from headprune.errors import InvalidInput
from headprune.schedules.spacing import targets


@pytest.mark.parametrize(
    ("spacing", "expected"),
    [
        ("linear", [0.2, 0.4, 0.6, 0.8]),
        ("cubic", [0.8 * 37 / 64, 0.8 * 7 / 8, 0.8 * 63 / 64, 0.8]),  # 1 - (1 - t)^3
        ("geometric", [1 - 0.2 ** (step / 4) for step in range(1, 5)]),  # each leaves the same share of what was there
    ],
)
def test_steps_are_spread_by_the_formula_and_the_last_is_the_target(spacing, expected):
    found = targets(0.8, 4, None, spacing)
    assert found == pytest.approx(expected)
    assert found[-1] == 0.8


@pytest.mark.parametrize(
    ("target", "per_step", "expected"),
    [
        (0.14, 0.02, [0.02, 0.04, 0.06, 0.08, 0.1, 0.12, 0.14]),
        (0.6, 0.2, [0.2, 0.4, 0.6]),
        (0.5, 0.2, [0.2, 0.4, 0.5]),
        (0.1, 0.3, [0.1]),
        (0.0, 0.3, [0.0]),
    ],
)
def test_equal_steps_end_at_the_target_without_one_too_many(target, per_step, expected):
    """0.14 / 0.02 is 7.000000000000001 in floating point."""
    assert targets(target, None, per_step, "linear") == pytest.approx(expected)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ((2, 0.1, "linear"), "give one of them"),
        ((0, None, "linear"), "steps is 0; expected a whole number"),
        ((None, 1.0, "linear"), r"per_step is 1\.0; expected a fraction"),
        ((None, 0.1, "cubik"), "unknown spacing 'cubik'. Did you mean 'cubic'"),
    ],
)
def test_what_spreads_nothing_is_named(wrong, message):
    with pytest.raises(InvalidInput, match=message):
        targets(0.5, *wrong)


def test_four_steps_where_nothing_is_said():
    assert targets(0.4, None, None, "linear") == targets(0.4, 4, None, "linear")
