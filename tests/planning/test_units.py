"""Steps that count on each other: valid in every order that an allocation may take them in."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headprune.head_map import HeadMap
from headprune.planning.allocation import Unit
from headprune.planning.engine import get_engine
from headprune.planning.units import even_steps, in_order, removable_units
from headprune.scoring import HeadScores, SiteShape

VALUES = st.lists(st.sampled_from([0.0, 1.0, 2.0, 5.0]), min_size=12, max_size=12)


def shape(kv_heads: int) -> SiteShape:
    return SiteShape(HeadMap.uniform(12, kv_heads), 8, 8, 48, 100, 70)


def groups(kv_heads: int) -> list[tuple[int, ...]]:
    size = 12 // kv_heads
    return [tuple(range(start, start + size)) for start in range(0, 12, size)]


@settings(max_examples=60)
@given(VALUES, st.sampled_from([1, 2, 3, 4, 6]), st.sets(st.integers(0, 11), max_size=4))
def test_every_step_leaves_groups_of_one_size(values, kv_heads, protected):
    left = set(range(12))
    for heads in even_steps(groups(kv_heads), values, protected, whole_groups=True):
        assert set(heads) <= left - protected
        left -= set(heads)
        assert shape(kv_heads).head_map.keep(left).is_uniform
    if not protected:
        assert left == set()


def test_groups_of_different_sizes_go_by_their_mean():
    """Three heads of 1 are worth less a head than one of 2, though they sum to more."""
    head_map = HeadMap((0, 0, 0, 1), 2)
    scores = HeadScores("by hand", {"a": torch.tensor([1.0, 1.0, 1.0, 2.0])}, {"a": SiteShape(head_map, 8, 8, 32, 100, 70)})
    units = removable_units(scores, "a", get_engine("headprune"), "kv_group", set(), 1, 0)
    assert [(unit.heads, unit.score) for unit in units] == [((0, 1, 2), 3.0), ((3,), 2.0)]


def test_where_all_key_value_heads_stay_each_step_takes_a_head_of_every_group():
    head_map = HeadMap((0, 0, 1, 1), 2, kv_stay=True)
    scores = HeadScores("by hand", {"a": torch.tensor([1.0, 2.0, 4.0, 3.0])}, {"a": SiteShape(head_map, 8, 8, 32, 100, 0)})
    for granularity in ("query_head", "kv_group"):
        units = removable_units(scores, "a", get_engine("llama.cpp"), granularity, set(), 1, 0)
        assert [unit.heads for unit in units] == [(0, 3), (1, 2)]


def test_without_whole_groups_every_key_value_head_stays():
    steps = even_steps([(0, 1, 2), (3, 4, 5)], [1.0, 1.0, 1.0, 9.0, 8.0, 7.0], set(), whole_groups=False)
    assert steps == [(0, 5), (1, 4)]


@settings(max_examples=60)
@given(VALUES, st.sampled_from([2, 4]), st.integers(0, 4), st.sampled_from([1, 2, 3]))
def test_joined_units_rise_in_score_and_end_before_too_few_heads_are_left(values, kv_heads, least, multiple):
    steps = even_steps(groups(kv_heads), values, set(), whole_groups=True)
    units = [Unit("a", heads, sum(values[head] for head in heads)) for heads in steps]
    found = in_order(shape(kv_heads), units, least, lambda left: left.query_heads % multiple == 0)
    means = [unit.mean_score for unit in found]
    assert means == sorted(means)
    left = set(range(12))
    for unit in found:
        left -= set(unit.heads)
        assert len(left) >= least
        assert len(left) % multiple == 0
        assert shape(kv_heads).head_map.keep(left).is_uniform


def test_a_low_step_behind_two_high_ones_pulls_both_forward():
    heads = [(0,), (1,), (2,), (3,)]
    units = [Unit("a", pair, score) for pair, score in zip(heads, [5.0, 1.0, 2.0, 9.0])]
    found = in_order(shape(12), units, 0, lambda left: True)
    assert [(unit.heads, unit.mean_score) for unit in found] == [((0, 1, 2), 8 / 3), ((3,), 9.0)]
