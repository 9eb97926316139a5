"""Whatever the scores, the geometry and the constraints: a plan costs no more than its budget, or says what could be met."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headprune.errors import InfeasibleBudget
from headprune.head_map import HeadMap
from headprune.planning import Budget, LatencyTable, plan
from headprune.planning.latency_table import key_of
from headprune.scoring import HeadScores, SiteShape


@st.composite
def models(draw):
    """1 to 4 attentions of different widths and groups, scores with ties and below 0 among them."""
    shapes, scores = {}, {}
    for index in range(draw(st.integers(1, 4))):
        kv_heads = draw(st.integers(1, 3))
        heads = kv_heads * draw(st.integers(1, 4))
        width = draw(st.sampled_from([4, 8]))
        shapes[f"layer{index}"] = SiteShape(HeadMap.uniform(heads, kv_heads), width, width, 32, 7 * width + 3, 5 * width)
        values = draw(st.lists(st.sampled_from([-1.0, 0.0, 0.5, 1.0, 2.0, 3.0]), min_size=heads, max_size=heads))
        scores[f"layer{index}"] = torch.tensor(values)
    return HeadScores("drawn", scores, shapes)


def budget_for(scores: HeadScores, quantity: str, fraction: float) -> Budget:
    times = {
        key_of(shape): tuple(100 + 37 * count for count in range(shape.head_map.query_heads + 1))
        for shape in scores.shapes.values()
    }
    table = LatencyTable("here", "float32", 1, 64, times, 500) if quantity == "latency" else None
    return Budget(**{quantity: fraction}, sequence_length=64, table=table)


@settings(max_examples=150, deadline=None)
@given(
    models(),
    st.sampled_from(["heads", "params", "kv_cache", "flops", "latency"]),
    st.floats(0, 0.95),
    st.sampled_from(["global", "uniform", "optimal"]),
    st.sampled_from(["query_head", "kv_group"]),
    st.integers(0, 2),
    st.sampled_from([1, 2]),
)
def test_a_budget_is_never_exceeded(scores, quantity, fraction, allocation, granularity, min_heads, multiple_of):
    budget = budget_for(scores, quantity, fraction)
    options = {"allocation": allocation, "granularity": granularity, "min_heads": min_heads, "multiple_of": multiple_of}
    full = budget.fixed_cost + sum(budget.cost(shape, shape.head_map) for shape in scores.shapes.values())
    try:
        found = plan(scores, budget, **options)
    except InfeasibleBudget as error:
        nearest = float(re.search(rf"{quantity}=([0-9.e-]*[0-9])", str(error)).group(1))
        assert nearest < fraction
        plan(scores, budget_for(scores, quantity, nearest), **options)  # which it says can be met
        return
    # "uniform" rounds the share of each site down: half of 7 heads is met by 3 of them.
    for part in [[name] for name in found] if allocation == "uniform" else [list(found)]:
        before = sum(budget.cost(found.shapes[name], found.shapes[name].head_map) for name in part)
        gone = before - sum(budget.cost(found.shapes[name], found.head_map(name)) for name in part)
        share = budget.fixed_cost * before // max(full - budget.fixed_cost, 1)
        assert gone >= int(fraction * (before + share) + 1e-9)
    for name, heads in found.items():
        shape = scores.shapes[name]
        assert len(heads) >= min(min_heads, shape.head_map.query_heads)
        if len(heads) < shape.head_map.query_heads:
            assert len(heads) % multiple_of == 0
            assert granularity == "query_head" or found.head_map(name).is_uniform
    assert any(found.values())


@pytest.mark.parametrize("quantity", ["heads", "params", "kv_cache", "flops"])
def test_a_budget_of_nothing_takes_nothing(quantity):
    shape = SiteShape(HeadMap.uniform(6, 2), 8, 8, 32, 100, 70)
    scores = HeadScores("by hand", {"a": torch.arange(6.0)}, {"a": shape})
    assert plan(scores, budget_for(scores, quantity, 0.0)).removed_heads == 0
