import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import bert, llama

from headprune.errors import CorruptCheckpoint, InfeasibleBudget, InvalidInput, InvalidPlan
from headprune.head_map import HeadMap
from headprune.planning import Budget, PruningPlan, plan
from headprune.scoring import HeadScores, SiteShape, score


def scores_of(values: dict[str, list[float]], kv_heads: int | None = None) -> HeadScores:
    shapes = {
        name: SiteShape(HeadMap.uniform(len(scores), kv_heads), 8, 8, 32, query_head_parameters=100, kv_head_parameters=70)
        for name, scores in values.items()
    }
    return HeadScores("by_hand", {name: torch.tensor(found, dtype=torch.float32) for name, found in values.items()}, shapes)


TWO_LAYERS = {"a": [5.0, 1.0, 8.0, 2.0], "b": [3.0, 9.0, 4.0, 7.0]}


def test_global_ranking_removes_the_lowest_of_the_whole_model():
    chosen = plan(scores_of(TWO_LAYERS), Budget(heads=0.5))
    assert chosen.keep == {"a": (0, 2), "b": (1, 3)}
    assert (chosen.removed_heads, chosen.total_heads) == (4, 8)


def test_uniform_takes_the_same_fraction_of_every_layer():
    chosen = plan(scores_of({"a": [1.0, 2.0, 3.0, 4.0], "b": [10.0, 30.0, 20.0, 40.0]}), Budget(heads=0.5), allocation="uniform")
    assert chosen.keep == {"a": (2, 3), "b": (1, 3)}


@settings(max_examples=60)
@given(st.lists(st.lists(st.floats(-5, 5), min_size=1, max_size=9), min_size=1, max_size=5), st.floats(0, 0.9))
def test_a_heads_budget_is_met_exactly_by_the_lowest_scores(layers, fraction):
    scores = scores_of({f"layer{index}": values for index, values in enumerate(layers)})
    total = sum(map(len, layers))
    wanted = int(fraction * total + 1e-9)
    if wanted > total - len(layers):
        with pytest.raises(InfeasibleBudget):
            plan(scores, Budget(heads=fraction))
        return
    chosen = plan(scores, Budget(heads=fraction))
    assert chosen.removed_heads == wanted
    assert all(len(heads) >= 1 for heads in chosen.values())
    removable = [
        (float(scores[name][head]), name, head) for name in scores for head in range(len(scores[name])) if len(chosen[name]) > 1
    ]
    gone = [value for value, name, head in removable if head not in chosen[name]]
    stay = [value for value, name, head in removable if head in chosen[name]]
    assert not gone or not stay or max(gone) <= min(stay)


def test_kv_groups_go_whole_and_leave_equal_groups():
    scores = scores_of({"a": [1.0, 9.0, 2.0, 3.0, 8.0, 8.0, 4.0, 4.0]}, kv_heads=4)
    chosen = plan(scores, Budget(heads=0.5), granularity="kv_group")
    assert chosen.keep == {"a": (0, 1, 4, 5)}
    assert chosen.head_map("a") == HeadMap.uniform(4, 2)


def test_query_heads_go_one_by_one_and_leave_ragged_groups():
    scores = scores_of({"a": [1.0, 9.0, 2.0, 3.0, 8.0, 8.0, 4.0, 4.0]}, kv_heads=4)
    assert plan(scores, Budget(heads=0.375)).head_map("a") == HeadMap((0, 1, 1, 2, 2), 3)


def test_a_parameter_budget_counts_a_shared_head_when_its_group_has_gone():
    scores = scores_of({"a": [1.0, 2.0, 3.0, 4.0]}, kv_heads=2)  # 4 x 100 + 2 x 70
    chosen = plan(scores, Budget(params=0.5))  # 270 to go: two query heads and their key/value head
    assert chosen.keep == {"a": (2, 3)}
    assert chosen.removed_parameters == 270
    assert plan(scores, Budget(params=0.3)).removed_parameters == 270  # one query head, 100, is not enough for 162


def test_a_cache_budget_counts_key_value_heads():
    scores = scores_of({"a": [9.0, 1.0, 2.0, 3.0]}, kv_heads=2)
    assert plan(scores, Budget(kv_cache=0.5)).head_map("a").kv_heads == 1


def test_a_cache_budget_takes_no_head_that_frees_nothing():
    scores = scores_of({"a": [1.0, 9.0, 2.0, 9.0, 3.0, 9.0, 4.0, 4.0]}, kv_heads=4)
    assert plan(scores, Budget(kv_cache=0.25)).keep == {"a": (0, 1, 2, 3, 4, 5)}
    assert len(plan(scores, Budget(kv_cache=0.25), granularity="query_head")["a"]) == 3  # 1, 2, 3 for nothing


@pytest.mark.parametrize(
    ("fraction", "kept", "told"), [(0.1, 4, "0% of heads away, not 10%"), (0.7, 2, "50% of heads away, not 70%")]
)
def test_it_is_said_how_much_less_than_asked_a_uniform_plan_takes(fraction, kept, told, caplog):
    scores = scores_of({"a": [1.0, 2.0, 3.0, 4.0], "b": [1.0, 2.0, 3.0, 4.0], "c": [1.0, 2.0, 3.0, 4.0]})
    plan(scores, Budget(heads=0.5), allocation="uniform")
    assert caplog.text == ""
    chosen = plan(scores, Budget(heads=fraction), allocation="uniform")
    assert {len(heads) for heads in chosen.keep.values()} == {kept}
    assert f"uniform rounds down in each layer: {told}" in caplog.text


@pytest.mark.parametrize("allocation", ["global", "uniform", "optimal"])
def test_a_cache_budget_takes_groups_and_no_head_that_leaves_its_group_behind(allocation):
    values = torch.rand(4, 32, generator=torch.Generator().manual_seed(0)).tolist()
    scores = scores_of({f"layer{index}": found for index, found in enumerate(values)}, kv_heads=8)
    chosen = plan(scores, Budget(kv_cache=0.5), allocation=allocation)
    assert (chosen.removed_heads, sum(chosen.head_map(name).kv_heads for name in chosen)) == (64, 16)
    assert all(chosen.head_map(name).is_uniform for name in chosen)
    assert plan(scores, Budget(kv_cache=0.5), allocation=allocation, granularity="query_head").removed_heads > 64


def test_the_nearest_budget_of_uniform_plans_is_one_that_every_site_can_meet():
    scores = scores_of({"a": [1.0, 2.0, 3.0], "b": [1.0, 2.0], "c": [1.0, 2.0, 3.0, 4.0]})
    with pytest.raises(InfeasibleBudget, match=r"left at b.*nearest budget that can be met is heads=0;"):
        plan(scores, Budget(heads=0.7), allocation="uniform", min_heads=2)


def test_the_nearest_budget_of_optimal_plans_leaves_a_head():
    scores = scores_of({"a": [1.0, 2.0, 3.0, 4.0], "b": [1.0, 2.0, 3.0, 4.0]})
    with pytest.raises(InfeasibleBudget, match=r"nearest budget that can be met is heads=0\.875;"):
        plan(scores, Budget(heads=0.99999999999), allocation="optimal", min_heads=0)


def test_protected_heads_stay():
    scores = scores_of(TWO_LAYERS)
    assert plan(scores, Budget(heads=0.25), protect=["a"]).keep == {"a": (0, 1, 2, 3), "b": (1, 3)}
    assert 1 in plan(scores, Budget(heads=0.5), protect={"a": [1]})["a"]
    assert len(plan(scores, Budget(heads=0.5), min_heads=2)["a"]) == 2


def test_a_plan_survives_the_disk(tmp_path):
    chosen = plan(score(llama(), criterion="magnitude_l1"), Budget(heads=0.5))
    chosen.save(tmp_path / "plan.json")
    again = PruningPlan.load(tmp_path / "plan.json")
    assert (again.keep, again.shapes, again.budget, again.criterion) == (
        chosen.keep, chosen.shapes, chosen.budget, chosen.criterion,
    )  # fmt: skip
    assert all(torch.equal(again.scores[name], chosen.scores[name]) for name in chosen)
    assert "8 of 16 query heads go" in str(again)


def test_a_plan_can_be_edited_by_hand(tmp_path):
    path = tmp_path / "plan.json"
    PruningPlan.from_keep(bert(), {"encoder.layer.0.attention": [1, 3]}).save(path)
    document = json.loads(path.read_text())
    assert document["sites"]["encoder.layer.1.attention"]["keep"] == [0, 1, 2, 3]
    document["sites"]["encoder.layer.1.attention"]["keep"] = [2]
    path.write_text(json.dumps(document))
    assert PruningPlan.load(path).keep == {"encoder.layer.0.attention": (1, 3), "encoder.layer.1.attention": (2,)}
    for wrong, told in (([4], "query head 4"), (3, "layer.1.attention: query heads are 3; expected"), (None, "heads are None")):
        document["sites"]["encoder.layer.1.attention"]["keep"] = wrong
        path.write_text(json.dumps(document))
        with pytest.raises(InvalidPlan, match=told):
            PruningPlan.load(path)


@pytest.mark.parametrize(
    ("content", "error", "names"),
    [
        ("{", InvalidInput, "cannot be read"),
        ('{"kind": "head_scores", "schema_version": 1}', InvalidInput, "holds head_scores"),
        ('{"kind": "pruning_plan", "schema_version": 9}', CorruptCheckpoint, "schema version 9"),
        ('{"kind": "pruning_plan", "schema_version": 1}', InvalidInput, "not a complete"),
        ('{"kind": "pruning_plan", "schema_version": 1, "criterion": null, "budget": null, "sites": []}', InvalidInput, "complete"),
        ('{"kind": "pruning_plan", "schema_version": "1"}', InvalidInput, "schema_version is '1'; expected 1"),
        ('{"kind": "pruning_plan"}', InvalidInput, "schema_version is None; expected 1"),
        ("[]", InvalidInput, "something else"),
    ],
)
def test_a_file_that_is_no_plan_is_refused(tmp_path, content, error, names):
    path = tmp_path / "plan.json"
    path.write_text(content)
    with pytest.raises(error, match=names):
        PruningPlan.load(path)


def test_a_plan_for_another_model_is_refused_with_the_difference():
    chosen = PruningPlan.from_keep(llama(), {})
    with pytest.raises(InvalidPlan, match=r"layers\.0\.self_attn it expects 8q/4kv.*has 8q/2kv"):
        chosen.check_fits(llama(kv_heads=2))
    with pytest.raises(InvalidPlan, match=r"layers\.2\.self_attn it expects no such site"):
        chosen.check_fits(llama(layers=3))
    chosen.check_fits(llama(seed=5))


@pytest.mark.parametrize(
    ("keep", "told"),
    [
        ({"nowhere": [0]}, "'nowhere'"),
        ({"model.layers.0.self_attn": [8]}, "query head 8 does not exist"),
        ({"model.layers.0.self_attn": [1, 1]}, "named more than once"),
    ],
)
def test_plans_by_hand_are_checked(keep, told):
    with pytest.raises(InvalidPlan, match=told):
        PruningPlan.from_keep(llama(), keep)


def test_a_plan_that_removes_everything_is_refused():
    with pytest.raises(InvalidPlan, match="every head of every site"):
        PruningPlan.from_keep(bert(layers=1), {"encoder.layer.0.attention": []})


@pytest.mark.parametrize("fraction", [-0.1, 1, 1.0, 1.5, float("nan"), True, "half"])
def test_a_fraction_outside_the_interval_is_refused_by_value(fraction):
    with pytest.raises(InvalidInput, match=f"heads={fraction!r}"):
        Budget(heads=fraction)


def test_a_budget_names_exactly_one_quantity():
    with pytest.raises(InvalidInput, match="exactly one"):
        Budget()
    with pytest.raises(InvalidInput, match="heads, params"):
        Budget(heads=0.1, params=0.1)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"allocation": "gobal"}, "Did you mean 'global'"),
        ({"granularity": "kv_grop"}, "Did you mean 'kv_group'"),
        ({"min_heads": -1}, "min_heads is -1"),
        ({"min_heads": 1.5}, "min_heads is 1.5; expected a whole number, 0 or more"),
        ({"multiple_of": "2"}, "multiple_of is '2'; expected a whole number, 1 or more"),
        ({"protect": ["c"]}, "unknown attention site"),
    ],
)
def test_unknown_options_are_refused(options, names):
    with pytest.raises(InvalidInput, match=names):
        plan(scores_of(TWO_LAYERS), Budget(heads=0.5), **options)


def test_scores_of_several_criteria_and_a_bare_number_are_refused():
    scores = scores_of(TWO_LAYERS)
    with pytest.raises(InvalidInput, match=r"expected the HeadScores of one criterion.* such as those by 'fisher'"):
        plan({"fisher": scores, "entropy": scores}, Budget(heads=0.5))
    with pytest.raises(InvalidInput, match=r"the budget is 0\.5; expected .*hp\.Budget\(heads=0\.5\)"):
        plan(scores, 0.5)


def test_a_budget_that_the_constraints_forbid_says_what_is_left():
    with pytest.raises(InfeasibleBudget, match="6 of 8 heads are left over 2 sites, 4 allowed"):
        plan(scores_of(TWO_LAYERS), Budget(heads=0.5), min_heads=3)


def test_with_min_heads_0_whole_attentions_may_go_but_not_all_of_them():
    found = plan(scores_of({"a": [0.1, 0.2], "b": [3.0, 4.0]}), Budget(heads=0.5), min_heads=0)
    assert (found["a"], found["b"]) == ((), (0, 1))
    with pytest.raises(InfeasibleBudget, match="2 of 2 heads are left"):
        plan(scores_of({"a": [0.1, 0.2]}, kv_heads=1), Budget(heads=0.5), min_heads=0, granularity="kv_group")


def test_a_plan_that_names_a_site_twice_is_refused(tmp_path):
    path = tmp_path / "plan.json"
    PruningPlan.from_keep(llama(), {}).save(path)
    path.write_text(path.read_text().replace("model.layers.1.self_attn", "model.layers.0.self_attn"))
    with pytest.raises(InvalidInput, match=r"plan\.json: model\.layers\.0\.self_attn stands in the file twice"):
        PruningPlan.load(path)


def test_a_plan_names_the_sites_of_its_shapes():
    whole = PruningPlan.from_keep(llama(), {})
    with pytest.raises(InvalidPlan, match=r"a plan must name every site once; it differs at \['model\.layers\.1\.self_attn'\]"):
        PruningPlan({"model.layers.0.self_attn": [0]}, whole.shapes)


def test_a_pickled_plan_is_refused_without_being_opened(tmp_path):
    import pickle

    class Trap:
        def __reduce__(self):
            return (pytest.fail, ("unpickled",))

    path = tmp_path / "plan.json"
    path.write_bytes(pickle.dumps(Trap()))
    with pytest.raises(InvalidInput, match="cannot be read as a pruning_plan file"):
        PruningPlan.load(path)
