import copy
import dataclasses
import pickle
import warnings
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_decoders import decoder
from tiny_encoders import SEQ2SEQ
from tiny_models import bert, hidden, llama, padded, tokens
from torch.nn.utils import prune as masks
from transformers import LlamaConfig, LlamaForCausalLM

from headprune.errors import InvalidInput, InvalidPlan, UnsupportedModel
from headprune.evaluation.memory import peak_bytes
from headprune.head_map import HeadMap
from headprune.models import attention_sites, gated
from headprune.planning import PruningPlan
from headprune.surgery import cut, prune
from headprune.surgery.cut import cut_site
from headprune.surgery.rehearse import rehearse
from headprune.surgery.verify import cut_error, same_tokens

FAMILIES = {
    "llama": llama, "bert": bert, "llama_mqa": lambda: llama(kv_heads=1), "llama_mha": lambda: llama(kv_heads=8),
    **{family: partial(decoder, family) for family in ("falcon_gqa", "gpt2", "gpt_neox", "gpt_oss", "olmo2", "phi3")},
    "t5": SEQ2SEQ["t5"].make,
}  # fmt: skip


def drawn_keep(model, data) -> dict[str, list[int]]:
    """Some heads of each site, at least one in the model."""
    sites = attention_sites(model)
    keep = {site.name: sorted(data.draw(st.sets(st.sampled_from(range(site.head_map.query_heads))))) for site in sites}
    return keep if any(keep.values()) else {**keep, sites[0].name: [0]}


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_cutting_heads_equals_gating_them(family, data):
    model = FAMILIES[family]()
    keep = drawn_keep(model, data)
    side = data.draw(st.sampled_from(["left", "right"]))
    inputs = padded(side=side)
    if family == "t5":
        inputs["decoder_input_ids"] = tokens(3, 9, seed=2)
    with gated(model, keep):
        expected = hidden(model, **inputs)
    cut(model, keep)
    assert (hidden(model, **inputs) - expected).abs().max() <= 1e-5


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


@pytest.mark.parametrize("keep", [[0, 1], None, {"model.layers.0.self_attn": [0.9, 1.9]}, {"model.layers.0.self_attn": "31"}])
def test_what_is_no_plan_is_refused_by_value(keep):
    model = llama()
    with pytest.raises(InvalidInput, match=r" (is|are) .*; expected "):
        cut(model, keep)
    with pytest.raises(InvalidInput, match=r"the plan is .*; expected a PruningPlan"):
        prune(model, keep)
    assert model.model.layers[0].self_attn.q_proj.out_features == 64


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


def test_a_failed_check_leaves_the_model_untouched():
    """A site whose heads are not where it says: key head 0 and 1 swapped."""
    model, name = llama(), "model.layers.1.self_attn"
    sites = attention_sites(model)
    key = sites[1].projection("key")
    swapped = dataclasses.replace(key, features=key.features[[1, 0, 2, 3]])
    wrong = dataclasses.replace(sites[1], projections=tuple(swapped if p.role == "key" else p for p in sites[1].projections))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UnsupportedModel, match=rf"{name} \(LlamaAttention\) gives something else when heads are cut"):
        rehearse(model, [(sites[0], (0, 1)), (wrong, (0, 1))], cut_site, None, True)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.config._attn_implementation == "sdpa"
    rehearse(model, [(wrong, (0, 1))], cut_site, None, False)


def test_a_layer_without_heads_keeps_its_place_in_the_cache():
    model = llama()
    cut(model, {"model.layers.0.self_attn": []})
    cache = model(input_ids=tokens(2, 5), use_cache=True).past_key_values
    assert cache.get_seq_length() == 5
    assert [tuple(layer.keys.shape) for layer in cache.layers] == [(2, 1, 5, 1), (2, 4, 5, 8)]
    assert str(attention_sites(model)[0].head_map) == "no heads"
    again = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert torch.equal(hidden(again, **padded()), hidden(model, **padded()))
    cut(model, {"model.layers.0.self_attn": [], "model.layers.1.self_attn": [0]})
    assert hidden(model, **padded()).isfinite().all()


def test_a_pruned_layer_follows_the_config_of_its_model_and_its_copies():
    model = llama()
    cut(model, {"model.layers.0.self_attn": [0, 1, 2]})
    copied = copy.deepcopy(model)
    copied.set_attn_implementation("eager")
    assert [m.config._attn_implementation for m in (model, copied)] == ["headprune", "eager"]
    assert copied.model.layers[0].self_attn.config.shared is copied.config
    assert torch.allclose(hidden(copied, **padded()), hidden(model, **padded()), atol=1e-5)
    # Equal groups again: the plain config is back.
    cut(model, {"model.layers.0.self_attn": [0, 2], "model.layers.1.self_attn": [0, 2]})
    assert model.model.layers[0].self_attn.config is model.config


def test_hooks_tied_weights_and_other_parametrisations_survive():
    model = llama(tie_word_embeddings=True)
    mlp, attention, seen = model.model.layers[0].mlp, model.model.layers[0].self_attn, []
    torch.nn.utils.parametrizations.weight_norm(mlp.up_proj)
    mlp.down_proj.register_forward_hook(lambda *_: seen.append("mlp"))
    attention.o_proj.register_forward_hook(lambda *_: seen.append("o_proj"))
    cut(model, {"model.layers.0.self_attn": [0, 1]}, verify=False)
    hidden(model, input_ids=tokens())
    assert seen == ["o_proj", "mlp"]
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.nn.utils.parametrize.is_parametrized(mlp.up_proj)


class Int8Weight(torch.Tensor):
    pass


def tie(model):
    layers = model.model.layers
    layers[1].self_attn.q_proj.weight = layers[0].self_attn.q_proj.weight


def share(model):
    model.model.layers[1].self_attn.q_proj = model.model.layers[0].self_attn.q_proj


def mask(model):
    masks.random_unstructured(model.model.layers[0].self_attn.o_proj, "weight", 0.3)


def quantise(model):
    weight = model.model.layers[0].self_attn.v_proj.weight
    model.model.layers[0].self_attn.v_proj.weight = torch.nn.Parameter(weight.detach().as_subclass(Int8Weight))


def quantise_by_torch(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.ao.quantization.quantize_dynamic(model.model.layers[1].self_attn, {torch.nn.Linear}, inplace=True)


def parametrise(model):
    torch.nn.utils.parametrizations.weight_norm(model.model.layers[0].self_attn.k_proj)


def offload(model):
    layer = model.model.layers[0].self_attn.o_proj
    layer._hf_hook, layer.weight = object(), torch.nn.Parameter(layer.weight.to("meta"))


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (tie, r"layers\.0\.self_attn\.q_proj\.weight and .*layers\.1.* are one tied weight"),
        (share, r"layers\.0\.self_attn\.q_proj is also model\.layers\.1\.self_attn\.q_proj; give each a layer"),
        (mask, r"the weight of .*layers\.0\.self_attn\.o_proj is made of others at each call; undo masks"),
        (quantise_by_torch, r"layers\.1\.self_attn\.q_proj is a torch\.ao\.nn\.quantized\S*\.Linear; heads can be cut"),
        (quantise, r"layers\.0\.self_attn\.v_proj holds Int8Weight weights"),
        (parametrise, r"layers\.0\.self_attn\.k_proj is a ParametrizedLinear"),
        (offload, r"layers\.0\.self_attn\.o_proj is offloaded"),
    ],
)
def test_weights_that_cannot_be_sliced_are_refused_by_name(change, names):
    model = llama()
    change(model)
    with pytest.raises(UnsupportedModel, match=names):
        cut(model, {"model.layers.0.self_attn": [0, 1]})
    assert model.model.layers[0].self_attn.q_proj.weight.shape == (64, 32)


@pytest.mark.parametrize("verify", [True, False])
def test_a_forward_that_was_replaced_is_not_overruled_in_silence(verify):
    model = llama()
    attention = model.model.layers[0].self_attn
    attention.forward = attention.forward
    with pytest.raises(UnsupportedModel, match="forward replaced"):
        cut(model, {"model.layers.0.self_attn": []}, verify=verify)
    assert attention.q_proj.weight.shape == (64, 32)


def test_a_dry_run_tells_what_pruning_saves_and_changes_nothing():
    model = llama()
    plan = PruningPlan.from_keep(model, {"model.layers.0.self_attn": [0, 1, 2], "model.layers.1.self_attn": []})
    before = copy.deepcopy(model.state_dict())
    told = prune(model, plan, dry_run=True)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert (model.config._attn_implementation, hasattr(model.config, "headprune"), told.done) == ("sdpa", False, False)
    assert "model.layers.1.self_attn: 8q/4kv -> no heads" in str(told)
    done = prune(model, plan)
    assert done.savings == told.savings
    assert done.savings.parameters == (sum(v.numel() for v in before.values()), sum(p.numel() for p in model.parameters()))
    # fp32; keys and values of 8 features for each of 2 x 4 key/value heads, of which 2 stay.
    assert done.savings.cache_bytes == (512, 128)
    assert done.savings.query_heads == (16, 3)
    # 2 a weight: of 32 inputs and outputs, with 64 + 2 * 32 + 64 features in each of two layers, then 24 + 2 * 16 + 24 in one.
    assert done.savings.projection_flops == (2 * 2 * 32 * 192, 2 * 32 * 80)


def test_the_cut_needs_no_more_memory_than_one_projection_beside_the_model():
    sizes = {"hidden_size": 512, "intermediate_size": 8, "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 8}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=4))
    keep = {site.name: [0, 1, 2, 3, 4, 6] for site in attention_sites(model)}
    largest = max(projection.module.weight.nbytes for site in attention_sites(model) for projection in site.projections)
    assert largest == 512 * 512 * 4
    whole = sum(parameter.nbytes for parameter in model.parameters())
    assert peak_bytes(lambda: cut(copy.deepcopy(model), keep, verify=False)) <= whole + largest


def test_a_model_built_from_the_config_of_a_pruned_one_is_told_so():
    pruned = llama()
    cut(pruned, {"model.layers.0.self_attn": [0, 1, 2]})
    other = type(pruned)(pruned.config)
    with pytest.raises(InvalidInput, match=r"layers\.0\.self_attn has 8 query heads, the model's config says 3 of a pruned model"):
        cut(other, {"model.layers.1.self_attn": [0, 1]})
