"""Plans for an engine: what it cannot run is never planned, and what contradicts it is refused by name."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import bert, llama

from headprune.errors import InfeasibleBudget, InvalidInput
from headprune.head_map import HeadMap
from headprune.planning import Budget, Engine, engines, plan, register_engine
from headprune.planning.engine import get_engine
from headprune.recipe import parse_recipe
from headprune.run_values import planning_options
from headprune.scoring import HeadScores, SiteShape, score
from headprune.surgery import cut

EVEN = ["llama.cpp", "vllm", "stock"]


def scores_of(layers: list[list[float]], kv_heads: int | None = None, hidden: int = 48) -> HeadScores:
    shapes = {
        f"layers.{index}": SiteShape(HeadMap.uniform(len(values), kv_heads), 8, 8, hidden, 100, 70)
        for index, values in enumerate(layers)
    }
    return HeadScores("by_hand", dict(zip(shapes, map(torch.tensor, layers))), shapes)


def head_maps(chosen) -> list[HeadMap]:
    return [chosen.head_map(name) for name in chosen]


VALUES = st.lists(st.lists(st.floats(0, 5, width=32), min_size=12, max_size=12), min_size=2, max_size=4)


@settings(max_examples=40)
@given(
    VALUES, st.sampled_from([12, 6, 4, 1]), st.sampled_from(EVEN), st.floats(0, 0.7), st.sampled_from(["query_head", "kv_group"])
)
def test_groups_stay_equal_and_the_budget_is_met(layers, kv_heads, target, fraction, granularity):
    scores = scores_of(layers, kv_heads)
    try:
        chosen = plan(scores, Budget(heads=fraction), target=target, granularity=granularity)
    except InfeasibleBudget:
        assert kv_heads > 1 or granularity == "kv_group" or fraction > 0.6  # some constraint leaves less than that to remove
        return
    wanted = len(layers) * int(fraction * 12) if target == "stock" else int(fraction * chosen.total_heads)
    assert chosen.removed_heads >= wanted
    assert all(found.is_uniform and found.query_heads for found in head_maps(chosen))
    if granularity == "kv_group":
        assert {max(found.group_sizes) for found in head_maps(chosen)} == {12 // kv_heads}
    if target == "stock":
        assert len(set(head_maps(chosen))) == 1
        assert 48 % head_maps(chosen)[0].query_heads == 0


@pytest.mark.parametrize(
    ("values", "gone"),
    [([1.0, 9.0, 8.0, 2.0], (0, 3)), ([1.0, 2.0, 8.0, 9.0], (0, 1)), ([3.0, 3.0, 3.0, 3.0], (0, 1))],
    ids=["a head of each group", "a group", "the first of equals"],
)
def test_what_scores_lowest_of_a_group_and_a_head_of_each_goes_first(values, gone):
    scores = scores_of([values, [10.0, 11.0, 12.0, 13.0]], kv_heads=2)
    chosen = plan(scores, Budget(heads=0.25), target="llama.cpp")
    assert chosen.keep == {"layers.0": tuple(sorted({0, 1, 2, 3} - set(gone))), "layers.1": (0, 1, 2, 3)}


def test_a_protected_head_stays_and_another_of_its_group_goes():
    scores = scores_of([[1.0, 9.0, 8.0, 2.0], [50.0, 60.0, 70.0, 80.0]], kv_heads=2)
    chosen = plan(scores, Budget(heads=0.25), target="llama.cpp", protect={"layers.0": [0, 2]})
    assert chosen.keep["layers.0"] == (0, 2)


def test_a_cache_budget_takes_whole_groups_where_groups_must_be_equal():
    scores = scores_of([[1.0, 8.0, 2.0, 9.0], [5.0, 6.0, 7.0, 8.0]], kv_heads=2)
    assert plan(scores, Budget(kv_cache=0.25), target="vllm").keep == {"layers.0": (2, 3), "layers.1": (0, 1, 2, 3)}


def test_llama_cpp_keeps_a_head_in_layer_0_alone():
    scores = scores_of([[0.0, 0.0], [0.1, 0.1], [5.0, 5.0]])
    chosen = plan(scores, Budget(heads=0.5), min_heads=0, target="llama.cpp")
    assert [found.query_heads for found in head_maps(chosen)] == [1, 0, 2]
    assert [len(kept) for kept in plan(scores, Budget(heads=0.5), min_heads=0).values()] == [0, 1, 2]


def test_vllm_keeps_multiples_of_key_value_heads_for_tensor_parallelism():
    scores = scores_of([[float(head) for head in range(16)]], kv_heads=8)
    (found,) = head_maps(plan(scores, Budget(heads=0.2), granularity="kv_group", multiple_of=4, target="vllm"))
    assert (found.query_heads, found.kv_heads) == (8, 4)
    (found,) = head_maps(plan(scores, Budget(heads=0.2), granularity="kv_group", multiple_of=4))
    assert (found.query_heads, found.kv_heads) == (12, 6)
    (found,) = head_maps(plan(scores, Budget(heads=0.5), multiple_of=4, target="vllm"))
    assert found.query_heads % 4 == found.kv_heads % 4 == 0


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        ("llamacpp", {}, "Did you mean 'llama.cpp'"),
        ("vllm", {"min_heads": 0}, "min_heads=0 lets whole ones go"),
        ("stock", {"min_heads": 0}, "a head in every layer"),
        ("stock", {"allocation": "global"}, "allocation='global' makes them differ"),
        ("stock", {"allocation": "optimal"}, "or target='vllm'"),
    ],
)
def test_conflicts_are_named(target, options, message):
    with pytest.raises(InvalidInput) as found:
        plan(score(bert(), criterion="random"), Budget(heads=0.5), target=target, **options)
    assert message in str(found.value)


def test_a_layer_that_may_not_change_is_named_where_all_must_be_alike():
    with pytest.raises(InfeasibleBudget, match=r"at encoder\.layer\.0\.attention"):
        plan(score(bert(), criterion="random"), Budget(heads=0.5), target="stock", protect=["encoder.layer.0.attention"])


def test_layers_that_differ_already_do_not_become_stock():
    model = bert()
    cut(model, {"encoder.layer.1.attention": [0, 1]})
    with pytest.raises(InvalidInput, match=r"has 4q/4kv already, encoder\.layer\.1\.attention 2q/2kv"):
        plan(score(model, criterion="random"), Budget(heads=0.2), target="stock")


@pytest.mark.parametrize("target", EVEN)
def test_a_ragged_model_is_refused_by_name(target):
    model = llama()
    cut(model, {"model.layers.1.self_attn": [0, 1, 2]})
    with pytest.raises(InvalidInput, match=r"model\.layers\.1\.self_attn has 3q/2kv ragged 2\+1"):
        plan(score(model, criterion="random"), Budget(heads=0.2), target=target)


@pytest.mark.parametrize(("target", "layer"), [("llama.cpp", 0), ("vllm", 1)])
def test_a_layer_that_has_lost_the_head_it_needs_is_named(target, layer):
    model, site = llama(), f"model.layers.{layer}.self_attn"
    cut(model, {site: []})
    with pytest.raises(InvalidInput, match=rf"needs a head at {site}, which has lost all of them already\. Plan from the model"):
        plan(score(model, criterion="random"), Budget(heads=0.2), target=target)


def test_an_engine_of_ones_own_is_a_target():
    assert {"headprune", "llama.cpp", "vllm", "stock"} <= set(engines())
    register_engine(Engine("a phone", "a head in every layer", every_layer=True))
    chosen = plan(scores_of([[0.0, 0.0], [3.0, 3.0]]), Budget(heads=0.25), target="a phone")
    assert [found.query_heads for found in head_maps(chosen)] == [1, 2]
    assert get_engine("a phone").floors(["x", "y"]) == {"x": 1, "y": 1}


def test_a_recipe_plans_for_its_engine():
    content = {"model": "minilm", "task": {"name": "docstring-retrieval"}, "output": "out", "plan": {"target": "stock"}}
    options = planning_options(parse_recipe(content, "of a test"))
    chosen = plan(score(llama(), criterion="magnitude_l1"), Budget(heads=0.5), **options)
    assert [str(found) for found in head_maps(chosen)] == ["4q/4kv", "4q/4kv"]


def test_stock_classes_take_head_counts_that_divide_the_hidden_size_where_the_whole_model_did():
    asks, does_not = (SiteShape(HeadMap.uniform(12), 8, 8, hidden, 100, 70) for hidden in (48, 40))
    allowed = lambda shape: [n for n in range(1, 13) if get_engine("stock").allows(shape, HeadMap.uniform(n), 1)]  # noqa: E731
    assert allowed(asks) == [1, 2, 3, 4, 6, 8, 12]
    assert allowed(does_not) == list(range(1, 13))


def test_key_value_heads_can_be_spread_over_the_devices_of_vllm():
    """Over 4 devices: a multiple of 4 of them, or 1 or 2, which are copied."""
    shape = SiteShape(HeadMap.uniform(24, 12), 8, 8, 48, 100, 70)
    uniform = (HeadMap.uniform(4 * kv_heads, kv_heads) for kv_heads in range(1, 13))
    assert [left.kv_heads for left in uniform if get_engine("vllm").allows(shape, left, 4)] == [1, 2, 4, 8, 12]
