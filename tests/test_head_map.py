import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headprune.errors import InvalidInput
from headprune.head_map import HeadMap

group_sizes = st.lists(st.integers(0, 5), min_size=1, max_size=6)


def from_groups(sizes: list[int]) -> HeadMap:
    return HeadMap(tuple(group for group, size in enumerate(sizes) for _ in range(size)), len(sizes))


@given(group_sizes)
def test_groups_tile_the_query_heads(sizes):
    head_map = from_groups(sizes)
    assert list(head_map.group_sizes) == sizes
    for group, (start, stop) in enumerate(zip(head_map.group_offsets, head_map.group_offsets[1:])):
        assert all(head_map.kv_of_query[head] == group for head in range(start, stop))
    assert head_map.group_offsets[-1] == head_map.query_heads


@given(group_sizes, st.data())
def test_kept_heads_read_the_same_key_value_heads_as_before(sizes, data):
    head_map = from_groups(sizes)
    kept = sorted(data.draw(st.sets(st.sampled_from(range(head_map.query_heads)))) if head_map.query_heads else [])
    smaller = head_map.keep(kept)
    originals = head_map.kept_kv_heads(kept)
    assert [originals[kv] for kv in smaller.kv_of_query] == [head_map.kv_of_query[head] for head in kept]
    assert smaller.kv_heads == len(originals) == len({head_map.kv_of_query[head] for head in kept})


@given(group_sizes, st.data())
def test_key_value_heads_that_are_others_too_all_stay(sizes, data):
    head_map = replace(from_groups(sizes), kv_stay=True)
    kept = sorted(data.draw(st.sets(st.sampled_from(range(head_map.query_heads)))) if head_map.query_heads else [])
    smaller = head_map.keep(kept)
    assert head_map.kept_kv_heads(kept) == tuple(range(head_map.kv_heads))
    assert smaller.kv_of_query == tuple(head_map.kv_of_query[head] for head in kept)
    assert (smaller.kv_heads, smaller.kv_stay) == (head_map.kv_heads, True)
    assert HeadMap.from_json(smaller.to_json()) == smaller


@given(group_sizes, st.data())
def test_keeping_twice_equals_keeping_once(sizes, data):
    head_map = from_groups(sizes)
    pick = lambda many: sorted(data.draw(st.sets(st.sampled_from(range(many)))) if many else [])  # noqa: E731
    first = pick(head_map.query_heads)
    second = pick(len(first))
    assert head_map.keep(first).keep(second) == head_map.keep([first[head] for head in second])


def test_uniform_maps_and_their_names():
    assert HeadMap.uniform(8, 4).kv_of_query == (0, 0, 1, 1, 2, 2, 3, 3)
    assert HeadMap.uniform(3).kv_heads == 3
    assert HeadMap.uniform(0).is_uniform
    assert str(HeadMap.uniform(8, 4)) == "8q/4kv"
    assert str(HeadMap((0, 0, 1), 2)) == "3q/2kv ragged 2+1"
    assert not HeadMap((0, 0, 1), 2).is_uniform


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda: HeadMap((1, 0), 2), "query head 1 reads 0 after 1"),
        (lambda: HeadMap((0, 2), 2), "reads key/value head 2"),
        (lambda: HeadMap((), -1), "-1"),
        (lambda: HeadMap.uniform(7, 2), "7 query heads"),
        (lambda: HeadMap.uniform(4).keep([4]), "query head 4"),
        (lambda: HeadMap.uniform(4).keep([1, 1]), "more than once"),
    ],
)
def test_impossible_maps_are_refused_by_name(make, names):
    with pytest.raises(InvalidInput, match=names.replace("/", "/")):
        make()


@pytest.mark.parametrize("heads", [[0.9, 1.9], "31", None, 3, [True, False], torch.tensor([True, False]), [None], np.float32(1)])
def test_heads_that_are_no_integers_are_refused(heads):
    with pytest.raises(InvalidInput, match=r"query heads are .*; expected the numbers of the heads, such as \[0, 2, 3\]"):
        HeadMap.uniform(4).checked(heads)


@pytest.mark.parametrize("heads", [[3, 1], (1, 3), {1, 3}, np.array([1, 3]), torch.tensor([3, 1]), iter([1, 3])])
def test_heads_may_be_of_any_integer_type(heads):
    assert HeadMap.uniform(4).checked(heads) == (1, 3)


@pytest.mark.parametrize("two", [np.int64(2), torch.tensor(2)])
def test_a_map_of_other_integer_types_is_that_of_pythons(two):
    for found in (HeadMap([two - two, two // two], two), HeadMap.uniform(two, two)):
        assert (found, hash(found)) == (HeadMap((0, 1), 2), hash(HeadMap((0, 1), 2)))
        assert HeadMap.from_json(json.loads(json.dumps(found.to_json()))) == found
