"""What a schedule says of itself."""

import pytest
from tiny_models import bert

from headprune.cli.terminal import rows_of
from headprune.planning import Budget, plan
from headprune.schedules.result import ScheduleResult, Step
from headprune.scoring import score


@pytest.fixture
def result() -> ScheduleResult:
    """Two steps, of which the second lost too much."""
    chosen = plan(score(bert(), criterion="magnitude_l1"), Budget(heads=0.25))
    whole = {name: tuple(range(4)) for name in chosen}
    history = (
        Step(0, 0.0, 0.0, whole, quality=-1.0),
        Step(1, 0.25, 0.25, chosen.keep, quality=-1.25, seconds={"score": 1.5, "prune": 0.5}),
        Step(2, 0.5, 0.5, dict.fromkeys(chosen, (0, 1)), quality=-9.0, accepted=False),
    )
    return ScheduleResult("iterative", bert(), chosen, history, stopped="step 2 lost 620% of the quality")


def test_the_quality_is_that_of_the_model_that_was_kept(result):
    assert result.quality == -1.25
    assert [step.heads for step in result.history] == [8, 6, 4]
    assert str(result) == "iterative: 2 of 8 query heads went; stopped: step 2 lost 620% of the quality"


def test_the_table_has_a_row_for_each_step_and_says_which_was_taken_back(result):
    rows = rows_of(result.__rich__())
    assert [list(row.values()) for row in rows] == [
        ["0", "0.0%", "0.0%", "8", "-1", "0.0"],
        ["1", "25.0%", "25.0%", "6", "-1.25", "2.0"],
        ["2, taken back", "50.0%", "50.0%", "4", "-9", "0.0"],
    ]


def test_a_step_comes_back_from_json_as_it_was(result):
    assert [Step.from_json(step.to_json()) for step in result.history] == list(result.history)
