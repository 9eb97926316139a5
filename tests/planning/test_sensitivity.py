from dataclasses import replace

import pytest
import torch
from tiny_models import llama, tokens

from headprune.errors import InvalidInput
from headprune.models import gated
from headprune.planning import Budget, Sensitivity, plan, sensitivity
from headprune.scoring import score

BATCHES = [{"input_ids": tokens(3, 8, seed), "labels": tokens(3, 8, seed)} for seed in range(2)]


def mean_loss(model) -> float:
    with torch.no_grad():
        return float(torch.stack([model(**batch).loss for batch in BATCHES]).mean())  # all samples are equally long


def test_curves_are_the_losses_with_the_lowest_heads_gone_one_after_another(tmp_path):
    model = llama()
    scores = score(model, criterion="random")
    found = sensitivity(model, BATCHES, scores)
    assert found.samples == 6
    assert found.dense == pytest.approx(mean_loss(model), rel=1e-5)
    name = "model.layers.1.self_attn"
    for gone in (1, 4, 8):
        stays = scores[name].argsort(descending=True)[: 8 - gone].tolist()
        with gated(model, {name: stays}):
            assert found.curves[name][gone] == pytest.approx(mean_loss(model), rel=1e-5)
    for head in (0, 5):
        with gated(model, {name: [other for other in range(8) if other != head]}):
            assert found.heads[name][head] == pytest.approx(mean_loss(model), rel=1e-5)
    found.save(tmp_path / "sensitivity.json")
    assert Sensitivity.load(tmp_path / "sensitivity.json") == found
    assert found.__rich__().row_count == 2


def test_the_curves_are_written_as_the_points_of_a_plot(tmp_path):
    found = Sensitivity("random", 4, 1.0, {"a": (1, 0)}, {"a": (1.0, 1.5, 3.0)}, {"a": (2.0, 1.5)})
    found.save_csv(tmp_path / "sensitivity.csv")
    assert (tmp_path / "sensitivity.csv").read_text().splitlines() == [
        "site,curve,heads_gone,head,loss,increase",
        "a,layer,0,,1.0,0.0",
        "a,layer,1,1,1.5,0.5",
        "a,layer,2,0,3.0,2.0",
        "a,head,1,0,2.0,1.0",
        "a,head,1,1,1.5,0.5",
    ]
    assert found.extremes("a") == "1: +0.5\n0: +1"
    found.save(tmp_path / "sensitivity.json")
    assert Sensitivity.load(tmp_path / "sensitivity.json") == found


def test_a_plan_by_curves_takes_the_heads_of_the_layer_that_tolerates_it():
    scores = score(llama(), criterion="random")
    first, second = scores
    order = {name: tuple(found.argsort().tolist()) for name, found in scores.items()}
    flat, steep = (1.0, *[1.0 + 0.01 * k for k in range(1, 9)]), (1.0, *[1.0 + k for k in range(1, 9)])
    curves = Sensitivity("random", 4, 1.0, order, {first: steep, second: flat})
    found = plan(scores, Budget(heads=0.25), allocation="optimal", sensitivity=curves)
    assert (len(found[first]), len(found[second])) == (8, 4)
    with pytest.raises(InvalidInput, match="another order of heads"):
        plan(score(llama(), criterion="magnitude_l1"), Budget(heads=0.25), allocation="optimal", sensitivity=curves)
    with pytest.raises(InvalidInput, match='allocation="global" does not read'):
        plan(scores, Budget(heads=0.25), sensitivity=curves)


def test_groups_of_heads_cost_what_the_curve_says_of_all_their_heads():
    """Of two layers one costs nothing up to two heads and much with four; a group is two heads, so one of each layer goes."""
    scores = score(llama(), criterion="random")
    scores = replace(scores, scores={name: torch.arange(8.0) for name in scores})
    order = dict.fromkeys(scores, tuple(range(8)))
    curve = (1.0, 1.0, 1.0, 3.0, 9.0, 9.0, 9.0, 9.0, 9.0)
    curves = Sensitivity("random", 4, 1.0, order, dict.fromkeys(order, curve))
    assert {shape.head_map.group_sizes for shape in scores.shapes.values()} == {(2, 2, 2, 2)}
    found = plan(scores, Budget(heads=0.25), allocation="optimal", granularity="kv_group", sensitivity=curves)
    assert [len(heads) for heads in found.values()] == [6, 6]


@pytest.mark.parametrize("options", [{"granularity": "kv_group"}, {"protect": True}, {"target": "vllm"}])
def test_curves_are_not_read_where_other_heads_go_than_those_that_were_measured(options):
    scores = score(llama(), criterion="random")
    order = {name: tuple(found.argsort().tolist()) for name, found in scores.items()}
    curves = Sensitivity("random", 4, 1.0, order, dict.fromkeys(order, (1.0,) * 9))
    if "protect" in options:
        options = {"protect": {name: heads[:1] for name, heads in order.items()}}
    with pytest.raises(InvalidInput, match=r"would be the first to go, and the sensitivity has measured heads"):
        plan(scores, Budget(heads=0.25), allocation="optimal", sensitivity=curves, **options)
    assert plan(scores, Budget(heads=0.25), allocation="optimal", sensitivity=curves, multiple_of=2).removed_heads == 4
    by_cache = plan(scores, Budget(kv_cache=0.25), allocation="optimal", sensitivity=curves)  # heads one by one there too
    assert all(set(order[name]) - set(heads) == set(order[name][: 8 - len(heads)]) for name, heads in by_cache.items())


def test_dips_of_a_curve_do_not_draw_heads():
    scores = score(llama(), criterion="random")
    order = {name: tuple(found.argsort().tolist()) for name, found in scores.items()}
    curve = (1.0, 1.5, 0.2, 1.2, 1.6, 2.0, 2.0, 2.0, 2.0)
    costs = Sensitivity("random", 4, 1.0, order, dict.fromkeys(order, curve)).costs(scores)
    assert costs["model.layers.0.self_attn"][:5] == pytest.approx((0.0, 0.5, 0.5, 0.5, 0.6))


def test_no_data_is_an_error():
    with pytest.raises(InvalidInput, match="empty"):
        sensitivity(llama(), [], score(llama(), criterion="random"))


def test_plain_torch_models_have_curves_too():
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(16, 4, 24, dropout=0.0, batch_first=True)
    model = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    batches = [torch.randn(3, 5, 16)]
    loss = lambda model, batch: model(batch).square().mean(dim=(1, 2))  # noqa: E731
    scores = score(model, batches, "gate_gradient", loss_fn=loss)
    found = sensitivity(model, batches, scores, loss_fn=loss)
    name = next(iter(scores))
    with gated(model, {name: []}), torch.no_grad():
        assert found.curves[name][4] == pytest.approx(float(loss(model, batches[0]).mean()), rel=1e-5)
    assert type(model.layers[0].self_attn) is torch.nn.MultiheadAttention


def test_an_attention_that_no_data_reached_keeps_its_heads():
    scores = score(llama(), criterion="random")
    found = sensitivity(llama(), BATCHES, scores)
    name = "model.layers.0.self_attn"
    scores = replace(scores, unreached=frozenset({name}))
    curves = {other: curve for other, curve in found.curves.items() if other != name}
    chosen = plan(scores, Budget(heads=0.25), allocation="optimal", sensitivity=replace(found, curves=curves))
    assert len(chosen[name]) == 8
    assert len(chosen["model.layers.1.self_attn"]) == 4
