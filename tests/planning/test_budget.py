import json
import math
from dataclasses import replace
from fractions import Fraction
from functools import partial

import numpy as np
import pytest
import torch
from tiny_decoders import decoder
from tiny_encoders import ENCODERS
from tiny_models import llama

from headprune.errors import InfeasibleBudget, InvalidInput
from headprune.evaluation.cost import attention_flops
from headprune.head_map import HeadMap
from headprune.models import attention_sites
from headprune.models.cached import CachedFeatures
from headprune.planning import Budget, LatencyTable, PruningPlan, plan
from headprune.planning.latency_table import key_of
from headprune.scoring import HeadScores, SiteShape, score
from headprune.surgery import prune


@pytest.mark.parametrize(
    "make",
    [llama, *(partial(decoder, family) for family in ("qwen3_next", "laguna", "gemma3n_shared"))],
    ids=["llama", "gated", "gates", "shared keys"],
)
def test_flops_are_those_of_the_model_before_and_after(make):
    model, budget = make(), Budget(flops=0.5, sequence_length=37)
    chosen = plan(score(model, criterion="random"), budget)
    cost = lambda: attention_flops(attention_sites(model), 37)  # noqa: E731
    before = cost()
    assert before == sum(budget.cost(shape, shape.head_map) for shape in chosen.shapes.values())
    prune(model, chosen)
    assert cost() == sum(budget.cost(chosen.shapes[name], chosen.head_map(name)) for name in chosen)
    assert cost() <= before / 2


@pytest.mark.parametrize(
    "make",
    [
        partial(decoder, "gemma3", sliding_window=8, layer_types=["sliding_attention", "full_attention"]),
        partial(decoder, "mistral", sliding_window=8),
        ENCODERS["modernbert"].make,
    ],
    ids=["gemma3", "mistral", "modernbert"],
)
def test_flops_count_the_keys_that_a_sliding_window_holds(make):
    """As many as the attentions of a run give weight to."""
    length, model = 24, make()
    model.set_attn_implementation("eager")
    scores, budget = score(model, criterion="random"), Budget(flops=0.5, sequence_length=length)
    with torch.no_grad():
        seen = model(input_ids=torch.ones(1, length, dtype=torch.long), output_attentions=True).attentions
    assert len(seen) == len(scores.shapes)
    for weights, shape in zip(seen, scores.shapes.values()):
        keys = int((weights > 0).sum(-1).max())
        projected = (shape.head_map.query_heads + shape.head_map.kv_heads) * 2 * shape.head_dim * shape.hidden_size
        products = keys * shape.head_map.query_heads * 2 * shape.head_dim
        assert budget.cost(shape, shape.head_map) == 2 * length * (projected + products)
        assert SiteShape.from_json(json.loads(json.dumps(shape.to_json()))).keys_in_window == shape.keys_in_window


@pytest.mark.parametrize(
    ("family", "per_head"), [("falcon_gqa", {"query_head": 2 * 8}), ("deepseek_v3", {"shared": 16 + 4}), ("falcon_mqa", None)]
)
def test_a_cache_budget_counts_what_the_model_caches(family, per_head, tmp_path):
    """Stock Falcon with groups caches a key and a value for every query head, latent attention nothing for any head."""
    model = decoder(family)
    scores = score(model, criterion="random")
    shape = next(iter(scores.shapes.values()))
    assert shape.cached == (None if per_head is None else CachedFeatures(**per_head))
    budget = Budget(kv_cache=0.5)
    if family == "falcon_gqa":
        chosen = plan(scores, budget)
        assert chosen.removed_heads == 4
        chosen.save(tmp_path / "plan.json")
        assert PruningPlan.load(tmp_path / "plan.json").shapes == chosen.shapes
    else:
        with pytest.raises(InfeasibleBudget, match="The nearest budget that can be met is kv_cache=0"):
            plan(scores, budget)
        assert sorted(len(heads) for heads in plan(scores, budget, min_heads=0, allocation="optimal").values()) == [0, 4]


@pytest.mark.parametrize("fraction", [1, 1.0, 1.5, -0.1, math.nan, True, "0.5"])
def test_a_fraction_outside_of_0_to_1_is_refused(fraction):
    with pytest.raises(InvalidInput, match="expected the fraction to remove, at least 0 and below 1"):
        Budget(heads=fraction)


@pytest.mark.parametrize("budget", [{}, {"heads": 0.5, "params": 0.5}])
def test_a_budget_is_of_one_quantity(budget):
    with pytest.raises(InvalidInput, match="a budget names exactly one of"):
        Budget(**budget)


@pytest.mark.parametrize(
    ("fraction", "heads", "gone"), [(0.29, 100, 29), (0.57, 100, 57), (0.58, 50, 29), (0.5, 7, 3), (0.99, 100, 99)]
)
def test_a_whole_number_of_heads_is_met_whatever_the_float_says(fraction, heads, gone):
    """0.29 * 100 is 28.999999999999996 in floating point."""
    scores = HeadScores("test", {"a": torch.arange(float(heads))}, {"a": SiteShape(HeadMap.uniform(heads), 8, 8, 32, 100, 0)})
    assert plan(scores, Budget(heads=fraction)).removed_heads == gone


def table(rest: int = 1000) -> tuple[HeadScores, LatencyTable]:
    shape = SiteShape(HeadMap.uniform(4), 8, 8, 32, 100, 0)
    scores = HeadScores("test", {"a": torch.arange(4.0), "b": torch.arange(4.0) + 0.5}, {"a": shape, "b": shape})
    return scores, LatencyTable("this machine", "float32", 1, 128, {key_of(shape): (100, 300, 600, 800, 1000)}, rest)


@pytest.mark.parametrize("allocation", ["global", "optimal", "uniform"])
def test_a_latency_budget_counts_the_whole_model_by_the_measured_table(allocation):
    scores, measured = table()
    found = plan(scores, Budget(latency=0.3, table=measured), allocation=allocation)  # 3000 ns, of which 900 are to go
    times = measured.attention[key_of(scores.shapes["a"])]
    assert 2000 - sum(times[len(heads)] for heads in found.values()) >= 900
    assert found.removed_heads == {"optimal": 4, "global": 5, "uniform": 6}[allocation]


def test_a_latency_that_cannot_be_met_is_told_in_milliseconds():
    scores, measured = table(rest=10**6)
    with pytest.raises(
        InfeasibleBudget, match=r"0\.0006 of 0\.002 ms are left over 2 sites, none allowed, as the rest of the model"
    ):
        plan(scores, Budget(latency=0.9, table=measured))
    with pytest.raises(InfeasibleBudget, match=r"0\.0006 of 0\.002 ms are left over 2 sites, 0\.0005 allowed"):
        plan(scores, Budget(latency=0.5, table=table()[1]))


def test_where_fewer_heads_take_longer_nothing_is_the_nearest_that_can_be_met():
    scores, measured = table()
    slower = replace(measured, attention=dict.fromkeys(measured.attention, (100, 1200, 1100, 1050, 1000)))
    with pytest.raises(InfeasibleBudget, match=r"nearest budget that can be met is latency=0;"):
        plan(scores, Budget(latency=0.5, table=slower))


@pytest.mark.parametrize(("sites", "alone"), [(("a",), "b is in this model"), (("a", "b", "c"), "c is in the table")])
def test_a_table_of_a_model_with_other_attentions_of_the_same_geometry_is_refused(sites, alone, tmp_path):
    scores, measured = table()
    plan(scores, Budget(latency=0.3, table=replace(measured, sites=("b", "a"))))
    replace(measured, sites=sites).save(tmp_path / "latency.json")
    other = LatencyTable.load(tmp_path / "latency.json")
    with pytest.raises(InvalidInput, match=f"another model, with {len(sites)} attentions; this one has 2, and {alone} alone"):
        plan(scores, Budget(latency=0.3, table=other))


@pytest.mark.parametrize("number", [np.float32(0.5), np.float64(0.5), Fraction(1, 2)])
def test_a_fraction_may_be_of_any_real_type(number):
    assert str(Budget(heads=number)) == "50% of heads away"
    with pytest.raises(InvalidInput, match=r"budget heads=tensor\(0\.5000\): expected the fraction"):
        Budget(heads=torch.tensor(0.5))


@pytest.mark.parametrize(
    "damage", [{"rest": "no"}, {"attention": {"4q/4kv": ["a"]}}, {"attention": {"4q/4kv": [None]}}, {"lengths": [1]}]
)
def test_a_damaged_table_is_refused_by_name(damage, tmp_path):
    measured = table()[1]
    measured.save(tmp_path / "latency.json")
    content = json.loads((tmp_path / "latency.json").read_text())
    (tmp_path / "latency.json").write_text(json.dumps(content | damage))
    with pytest.raises(InvalidInput, match=r"latency\.json is not a complete latency_table file"):
        LatencyTable.load(tmp_path / "latency.json")


def test_a_table_of_fewer_heads_is_refused():
    scores, measured = table()
    short = replace(measured, attention={key: times[:-1] for key, times in measured.attention.items()})
    with pytest.raises(InvalidInput, match=r"no attention of 4q/4kv.* with 4 heads"):
        plan(scores, Budget(latency=0.1, table=short))


def test_tables_survive_the_disk_and_name_what_does_not_fit(tmp_path):
    scores, measured = table()
    measured.save(tmp_path / "latency.json")
    assert LatencyTable.load(tmp_path / "latency.json") == measured
    measured.refuse_other_machine(["this machine"])
    with pytest.raises(InvalidInput, match="measured on this machine, this is another"):
        measured.refuse_other_machine(["another"])
    other = SiteShape(HeadMap.uniform(8), 8, 8, 32, 100, 0)
    with pytest.raises(InvalidInput, match="no attention of 8q/8kv"):
        plan(HeadScores("test", {"a": torch.arange(8.0)}, {"a": other}), Budget(latency=0.1, table=measured))
    with pytest.raises(InvalidInput, match=r"needs --table \(table=\)"):
        plan(scores, Budget(latency=0.1))


def test_a_measurement_is_good_for_one_geometry_alone():
    shape = SiteShape(HeadMap.uniform(4), 8, 8, 32, 100, 0)
    others = [
        replace(shape, head_map=HeadMap.uniform(4, 2)),
        replace(shape, head_map=HeadMap.uniform(8)),
        replace(shape, head_dim=16),
        replace(shape, value_dim=16),
        replace(shape, hidden_size=64),
        replace(shape, head_map=replace(shape.head_map, kv_stay=True)),
        replace(shape, head_map=replace(shape.head_map, kv_stay=True), own_keys=False),
    ]
    assert len({key_of(one) for one in (shape, *others)}) == 8
    assert key_of(replace(shape, query_head_parameters=1, output_bias=True)) == key_of(shape)


def test_budgets_survive_the_disk_with_their_length(tmp_path):
    plan(score(llama(), criterion="random"), Budget(flops=0.25, sequence_length=64)).save(tmp_path / "plan.json")
    assert PruningPlan.load(tmp_path / "plan.json").budget == Budget(flops=0.25, sequence_length=64)
    with pytest.raises(InvalidInput, match="sequence_length is 0"):
        Budget(flops=0.5, sequence_length=0)
