import copy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_models import bert, hidden, llama, padded, tokens

from headprune.errors import InvalidInput, InvalidPlan, UnsupportedModel
from headprune.head_map import HeadMap
from headprune.models import attention_sites, gated
from headprune.planning import PruningPlan
from headprune.surgery import cut, prune
from headprune.surgery.verify import cut_error, same_tokens

FAMILIES = {"llama": llama, "bert": bert, "llama_mqa": lambda: llama(kv_heads=1), "llama_mha": lambda: llama(kv_heads=8)}


def drawn_keep(model, data) -> dict[str, list[int]]:
    """Some heads of each site, at least one in the model."""
    sites = attention_sites(model)
    keep = {site.name: sorted(data.draw(st.sets(st.sampled_from(range(site.head_map.query_heads))))) for site in sites}
    return keep if any(keep.values()) else {**keep, sites[0].name: [0]}


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_cutting_heads_equals_gating_them(family, data):
    model = FAMILIES[family]()
    keep = drawn_keep(model, data)
    side = data.draw(st.sampled_from(["left", "right"]))
    inputs = padded(side=side)
    with gated(model, keep):
        expected = hidden(model, **inputs)
    cut(model, keep)
    assert torch.allclose(hidden(model, **inputs), expected, atol=1e-5)


def test_a_ragged_decoder_generates_what_its_gated_original_does():
    model = llama()
    plan = PruningPlan.from_keep(model, {"model.layers.0.self_attn": [0, 1, 3, 6], "model.layers.1.self_attn": [2, 5, 6, 7]})
    pruned = copy.deepcopy(model)
    prune(pruned, plan)
    assert not attention_sites(pruned)[0].head_map.is_uniform
    prompt = padded(side="left")
    assert same_tokens(model, pruned, plan, prompt, tokens=20)
    for cache in ("dynamic", "static"):
        options = {"max_new_tokens": 10, "do_sample": False, "cache_implementation": cache, "disable_compile": True}
        with gated(model, plan):
            expected = model.generate(**prompt, **options)
        assert torch.equal(pruned.generate(**prompt, **options), expected)


def test_the_cache_shrinks_with_the_key_value_heads():
    model = llama()
    cut(model, {"model.layers.0.self_attn": [0, 1, 6]})
    cache = model(input_ids=tokens(), use_cache=True).past_key_values
    assert [layer.keys.shape[1] for layer in cache.layers] == [2, 4]


def test_shapes_dtype_and_requires_grad_after_the_cut():
    model = llama().to(torch.bfloat16)
    attention = model.model.layers[0].self_attn
    attention.q_proj.weight.requires_grad_(False)
    cut(model, {"model.layers.0.self_attn": [0, 1, 6]})
    assert attention.q_proj.weight.shape == (24, 32)
    assert attention.k_proj.weight.shape == attention.v_proj.weight.shape == (16, 32)
    assert attention.o_proj.weight.shape == (32, 24)
    assert (attention.o_proj.in_features, attention.q_proj.out_features) == (24, 24)
    assert attention.q_proj.weight.dtype == torch.bfloat16
    assert not attention.q_proj.weight.requires_grad
    assert attention.o_proj.weight.requires_grad
    assert attention_sites(model)[0].head_map == HeadMap((0, 0, 1), 2)


def test_equal_groups_stay_with_stock_attention():
    model = llama()
    cut(model, {"model.layers.0.self_attn": [0, 1, 4, 5]})
    assert model.config._attn_implementation == "sdpa"
    assert hidden(model, **padded()).isfinite().all()
    model = llama()
    cut(model, {"model.layers.0.self_attn": [0, 1, 4]})
    assert model.config._attn_implementation == "headprune"


def test_pruning_twice_equals_pruning_once():
    twice, once = llama(), llama()
    name = "model.layers.1.self_attn"
    cut(twice, {name: [1, 2, 5, 7]})
    cut(twice, {name: [0, 3]})
    cut(once, {name: [1, 7]})
    assert torch.equal(hidden(twice, input_ids=tokens()), hidden(once, input_ids=tokens()))
    assert twice.config.headprune == once.config.headprune
    assert once.config.headprune["sites"][name]["kept"] == [1, 7]


def test_a_training_step_after_the_cut_lowers_the_loss():
    model = llama()
    cut(model, {"model.layers.0.self_attn": [0, 3, 4], "model.layers.1.self_attn": [7]})
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    ids = tokens()
    before = model(input_ids=ids, labels=ids).loss
    before.backward()
    optimizer.step()
    assert model(input_ids=ids, labels=ids).loss < before


def test_the_self_check_sees_a_wrong_cut():
    model = llama()
    keep = {"model.layers.0.self_attn": (0, 1, 2, 3), "model.layers.1.self_attn": tuple(range(8))}
    pruned = copy.deepcopy(model)
    cut(pruned, keep)
    run = lambda m: hidden(m, input_ids=tokens())  # noqa: E731
    assert cut_error(model, pruned, keep, run) < 1e-5
    pruned.model.layers[0].self_attn.v_proj.weight.data.add_(0.1)
    assert cut_error(model, pruned, keep, run) > 1e-3


@pytest.mark.parametrize(
    ("keep", "error"),
    [
        ({"model.layers.0.self_attn": [], "model.layers.1.self_attn": []}, InvalidPlan),
        ({"model.layers.0.self_attn": [9]}, InvalidInput),
        ({"model.layers.0.self_attn": [0, 0]}, InvalidInput),
        ({"model.layers.7.self_attn": [0]}, InvalidPlan),
    ],
)
def test_a_bad_cut_leaves_the_model_untouched(keep, error):
    model = llama()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error):
        cut(model, {"model.layers.1.self_attn": [0], **keep})
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_ragged_groups_without_an_attention_interface_are_refused():
    layer = llama().model.layers[0]
    before = layer.self_attn.q_proj.weight.clone()
    with pytest.raises(UnsupportedModel, match="kv_group"):
        cut(layer, {"self_attn": [0, 1, 2]})
    assert torch.equal(layer.self_attn.q_proj.weight, before)
