"""The batch of each step is a matter of the step alone, so that a killed training goes on with what it would have read."""

from itertools import islice

import pytest

from headprune.errors import InvalidInput
from headprune.schedules.training_data import batches_from


class Loader:
    """Read again and again, always in its own order."""

    def __iter__(self):
        return iter("abc")


@pytest.mark.parametrize("data", [list(range(5)), Loader()])
def test_a_training_that_goes_on_reads_what_the_whole_one_reads(data):
    whole = list(batches_from(data, 0, 12, seed=3))
    assert len(whole) == 12
    for first in (0, 1, 5, 7, 11, 12):
        assert list(batches_from(data, first, 12, seed=3)) == whole[first:]


def test_a_list_comes_whole_in_every_epoch_and_each_time_in_another_order():
    epochs = [list(islice(batches_from(range(20), 20 * epoch, 60, seed=0), 20)) for epoch in range(3)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_what_can_be_read_once_must_be_long_enough():
    assert list(batches_from(iter("abc"), 0, 3, seed=0)) == ["a", "b", "c"]
    with pytest.raises(InvalidInput, match="ran out after 3 of 4 batches; give a list"):
        list(batches_from(iter("abc"), 0, 4, seed=0))
    with pytest.raises(InvalidInput, match="the training data is empty"):
        next(batches_from([], 0, 1, seed=0))
