"""Batches are told apart by all that they hold, and by nothing else."""

from dataclasses import dataclass

import numpy
import pytest
import torch

from headprune.errors import InvalidInput
from headprune.scoring.batch_identity import checksum, data_identity, digest

BATCH = {"input_ids": torch.arange(6).view(2, 3), "text": ["a", "b"], "weight": 0.5}
OTHERS = {
    "another value": BATCH | {"input_ids": torch.arange(1, 7).view(2, 3)},
    "another shape": BATCH | {"input_ids": torch.arange(6).view(3, 2)},
    "another dtype": BATCH | {"input_ids": torch.arange(6, dtype=torch.int32).view(2, 3)},
    "another text": BATCH | {"text": ["a", "c"]},
    "texts cut elsewhere": BATCH | {"text": ["ab", ""]},
    "another number": BATCH | {"weight": 0.25},
    "a key less": {"input_ids": BATCH["input_ids"], "text": ["a", "b"]},
    "an array": BATCH | {"input_ids": numpy.arange(1, 7)},
}


@pytest.mark.parametrize("identity", [checksum, digest])
def test_the_same_content_is_the_same_batch_in_any_order_and_memory(identity):
    same = {"weight": 0.5, "text": ("a", "b"), "input_ids": torch.arange(6).view(3, 2).T.contiguous().T.reshape(2, 3)}
    assert identity(same) == identity(BATCH)
    found = [identity(other) for other in OTHERS.values()]
    assert len({identity(BATCH), *found}) == len(OTHERS) + 1
    arrays = [identity({"x": numpy.full(3, value)}) for value in (1, 2)]
    assert arrays[0] != arrays[1]


def test_an_object_of_unknown_content_has_a_checksum_but_no_name():
    assert checksum({"x": object()}) == checksum({"x": object()})
    with pytest.raises(InvalidInput, match="a batch holds a object"):
        digest({"x": object()})


@dataclass
class Pair:
    query: list[int]
    label: float


@pytest.mark.parametrize("identity", [checksum, digest])
def test_where_parts_begin_and_end_counts(identity):
    alike = ([1, 23], [12, 3], [[1], [23]], [[1, 23]], {1: 23}, "[1, 23]", Pair([1, 23], 1.0), Pair([12, 3], 1.0), Pair([1], 23.0))
    scalars = (numpy.int64(3), numpy.int64(4), numpy.float32(3), numpy.float32(4))
    assert len({identity(one) for one in (*alike, *scalars)}) == len(alike) + len(scalars)
    assert identity(Pair([1], 2.0)) == identity(Pair([1], 2.0))


def test_training_data_are_told_by_all_their_batches():
    batches = [{"x": torch.arange(3)}, {"x": torch.arange(4)}]
    assert data_identity(batches) == data_identity(tuple(batches)) != data_identity(batches[::-1])
    assert data_identity(None) is None
    assert data_identity(iter(batches)).endswith("unknown batches")
