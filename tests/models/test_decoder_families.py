"""Every decoder family: cutting equals gating, and what was cut still decodes, trains, saves and composes."""

import copy
import random
import zlib
from itertools import cycle

import pytest
import torch
import transformers
from packaging.version import Version
from tiny_decoders import FAMILIES, decoder
from tiny_models import hidden, padded, tokens

import headprune as hp
from headprune.evaluation.cost import kv_cache_bytes_per_token
from headprune.models import attention_sites, gated
from headprune.surgery import cut

# Query heads kept in the first and in the second layer; four heads, in grouped families two to a key/value head.
PLANS = {
    "ragged": ([0, 1, 3], [0, 2, 3]),
    "whole group, keep one": ([2, 3], [1]),
    "no first layer": ([], [1, 2, 3]),
    "no last layer": ([0, 3], []),
}
NO_STATIC_CACHE = {"falcon_alibi", "openai_gpt"}  # the stock model itself fails with one
NO_ASSISTANT = {"mpt", "openai_gpt"}  # decode without a cache, by default or always, and assisted decoding needs one
CROPS_WINDOWS = Version(transformers.__version__) >= Version("5.23")  # earlier, assisted decoding fails in stock models with one


def drawn(family: str) -> tuple[list[int], list[int]]:
    rng = random.Random(zlib.crc32(family.encode()))
    return tuple(sorted(rng.sample(range(4), rng.randint(1, 3))) for _ in range(2))


def plan_of(model, keep) -> dict[str, list[int]]:
    """In models of more layers the plan goes on from its beginning."""
    return dict(zip((site.name for site in attention_sites(model)), cycle(keep)))


def pruned_pair(family: str, keep):
    """(whole model, pruned copy, plan)"""
    model = decoder(family)
    plan, pruned = plan_of(model, keep), copy.deepcopy(model)
    cut(pruned, plan)
    return model, pruned, plan


def both_sides() -> dict[str, torch.Tensor]:
    """Rows padded on the left, then the same on the right."""
    left, right = padded(side="left"), padded(side="right")
    return {name: torch.cat([left[name], right[name]]) for name in left}


def gap(model, pruned, plan) -> float:
    with gated(model, plan):
        expected = hidden(model, **both_sides())
    return float((hidden(pruned, **both_sides()) - expected).abs().max())


def implementations(model):
    """Gives `model` each attention implementation that it can be switched to."""
    for implementation in ("eager", "sdpa", "headprune") if model._can_set_attn_implementation() else ():
        try:
            model.set_attn_implementation(implementation)
        except ValueError:  # Gemma 2 and gpt-oss know no sdpa
            assert implementation == "sdpa"
            continue
        yield implementation


@pytest.mark.parametrize("family", FAMILIES)
def test_cutting_equals_gating(family):
    for keep in (*PLANS.values(), drawn(family)):
        model, pruned, plan = pruned_pair(family, keep)
        rounding = 5e-6 * len(plan)
        assert gap(model, pruned, plan) <= rounding, keep
        for implementation in implementations(model):
            pruned.set_attn_implementation(implementation)
            assert gap(model, pruned, plan) <= rounding, (keep, implementation)
        assert gap(model, pruned, {}) > 1e-2, "the removed heads did nothing"


@pytest.mark.parametrize("keep", [PLANS["ragged"], PLANS["no first layer"]], ids=["ragged", "no first layer"])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_generates_what_the_gated_model_does(family, keep):
    model, pruned, plan = pruned_pair(family, keep)
    greedy = {**padded(side="left"), "max_new_tokens": 6, "do_sample": False}
    static = {"cache_implementation": "static", "disable_compile": True}
    for options in ({}, static, {"num_beams": 2}):
        if options is static and family in NO_STATIC_CACHE:
            continue
        with gated(model, plan):
            expected = model.generate(**greedy, **options)
        assert torch.equal(pruned.generate(**greedy, **options), expected), options
    assisted = family not in NO_ASSISTANT and not model._is_stateful  # linear attention cannot take tokens back
    if assisted and (CROPS_WINDOWS or not getattr(model.config, "sliding_window", None)):
        alone = {**greedy, "input_ids": tokens(1, 7), "attention_mask": torch.ones(1, 7, dtype=torch.long)}
        assert torch.equal(pruned.generate(**alone, assistant_model=model), pruned.generate(**alone))
        if keep == PLANS["ragged"]:
            assert torch.equal(model.generate(**alone, assistant_model=pruned), model.generate(**alone))


@pytest.mark.parametrize("family", FAMILIES)
def test_whole_groups_and_single_heads_generate_in_other_attentions_too(family):
    model, pruned, plan = pruned_pair(family, PLANS["whole group, keep one"])
    greedy = {**padded(side="left"), "max_new_tokens": 4, "do_sample": False}
    for implementation in ("eager", "headprune") if model._can_set_attn_implementation() else (None,):
        for found in (model, pruned) if implementation else ():
            found.set_attn_implementation(implementation)
        for options in ({}, {"cache_implementation": "static", "disable_compile": True}):
            if options and family in NO_STATIC_CACHE:
                continue
            with gated(model, plan):
                expected = model.generate(**greedy, **options)
            assert torch.equal(pruned.generate(**greedy, **options), expected), (implementation, options)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "stablelm"])  # it has modules for single heads
def test_dtype_frozen_weights_and_hooks_of_others_survive(family):
    model = decoder(family).to(torch.bfloat16)
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index % 2 == 0)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    calls = []
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: calls.append(name))
    hidden(model, **padded())
    expected = calls.copy()
    cut(model, plan_of(model, PLANS["ragged"]))
    calls.clear()
    hidden(model, **padded())
    assert calls == expected
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("family", ["falcon_mqa", "gpt2", "gpt_neox", "gpt_oss", "olmo2", "phi3"])
def test_weights_that_were_tied_stay_tied_and_are_saved_once(family, tmp_path):
    model = decoder(family, tie_word_embeddings=True)
    embedded = model.get_input_embeddings().weight
    assert model.get_output_embeddings().weight is embedded
    cut(model, plan_of(model, PLANS["ragged"]))
    assert model.get_output_embeddings().weight is embedded
    again = hp.load(hp.save(model, tmp_path / "model"))
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight
    assert torch.equal(again.get_input_embeddings().weight, embedded)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_cache_holds_what_is_counted_for_it(family):
    model, pruned, _ = pruned_pair(family, PLANS["whole group, keep one"])
    for found in (model, pruned):
        cache = found(tokens(1, 3), use_cache=True).get("past_key_values")  # three tokens are within every window
        layers = [] if cache is None else cache.layers
        held = sum(
            states.numel() for layer in layers if getattr(layer, "keys", None) is not None for states in (layer.keys, layer.values)
        )
        assert kv_cache_bytes_per_token(attention_sites(found), bytes_per_value=1) * 3 == held


@pytest.mark.parametrize("family", FAMILIES)
def test_it_survives_the_disk_and_composes(family, tmp_path):
    model, pruned, _ = pruned_pair(family, PLANS["no last layer"])
    twice = decoder(family)
    cut(twice, plan_of(model, ([0, 2, 3], [1])))
    hp.save(twice, tmp_path / "once")
    twice = hp.load(tmp_path / "once")
    cut(twice, plan_of(model, ([0, 2], [])))
    twice.set_attn_implementation(pruned.config._attn_implementation)
    assert torch.allclose(hidden(twice, **padded()), hidden(pruned, **padded()), atol=1e-6)
    assert {name: value.shape for name, value in twice.state_dict().items()} == {
        name: value.shape for name, value in pruned.state_dict().items()
    }
    hp.save(twice, tmp_path / "twice")
    again = hp.load(tmp_path / "twice", attn_implementation=twice.config._attn_implementation)
    assert all(torch.equal(value, twice.state_dict()[name]) for name, value in again.state_dict().items())
    # Weights that lie otherwise in memory: the products of single rows (a shared expert's gate) are rounded otherwise.
    assert torch.allclose(hidden(again, **padded()), hidden(twice, **padded()), atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_training_step_lowers_the_loss(family):
    _, pruned, _ = pruned_pair(family, PLANS["ragged"])
    pruned.train()
    ids = tokens()
    before = pruned(input_ids=ids, labels=ids).loss
    before.backward()
    assert all(site.output.module.weight.grad.abs().sum() > 0 for site in attention_sites(pruned))
    torch.optim.SGD(pruned.parameters(), lr=0.01).step()
    assert pruned(input_ids=ids, labels=ids).loss < before


def test_bloom_that_slices_its_weights_anew_at_every_pass_is_refused():
    model = decoder("bloom", pretraining_tp=2, slow_but_exact=True)
    with pytest.raises(hp.UnsupportedModel, match="set slow_but_exact=False"):
        attention_sites(model)
