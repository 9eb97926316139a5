"""Every decoder family: cutting equals gating, and what was cut still decodes, trains, saves and composes."""

import copy
import random
import zlib

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
NO_STATIC_CACHE = {"falcon_alibi"}  # the stock model itself fails with one
NO_ASSISTANT = {"mpt"}  # decodes without a cache by default, which assisted decoding needs
CROPS_WINDOWS = Version(transformers.__version__) >= Version("5.23")  # earlier, assisted decoding fails in stock models with one


def drawn(family: str) -> tuple[list[int], list[int]]:
    rng = random.Random(zlib.crc32(family.encode()))
    return tuple(sorted(rng.sample(range(4), rng.randint(1, 3))) for _ in range(2))


def plan_of(model, keep) -> dict[str, list[int]]:
    return dict(zip((site.name for site in attention_sites(model)), keep))


def pruned_pair(family: str, keep):
    """(whole model, pruned copy, plan)"""
    model = decoder(family)
    plan, pruned = plan_of(model, keep), copy.deepcopy(model)
    cut(pruned, plan)
    return model, pruned, plan


def gap(model, pruned, plan, inputs) -> float:
    with gated(model, plan):
        expected = hidden(model, **inputs)
    return float((hidden(pruned, **inputs) - expected).abs().max())


@pytest.mark.parametrize("family", FAMILIES)
def test_cutting_equals_gating(family):
    for keep in (*PLANS.values(), drawn(family)):
        model, pruned, plan = pruned_pair(family, keep)
        for side in ("left", "right"):
            assert gap(model, pruned, plan, padded(side=side)) <= 1e-5, (keep, side)
        assert gap(model, pruned, {}, padded()) > 1e-2, "the removed heads did nothing"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_attention_implementation_runs_ragged_groups(family):
    model, pruned, plan = pruned_pair(family, PLANS["ragged"])
    for implementation in ("eager", "sdpa", "headprune") if model._can_set_attn_implementation() else ():
        try:
            model.set_attn_implementation(implementation)
        except ValueError:  # Gemma 2 and gpt-oss know no sdpa
            assert implementation == "sdpa"
            continue
        pruned.set_attn_implementation(implementation)
        assert gap(model, pruned, plan, padded()) <= 1e-5, implementation


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
    if family not in NO_ASSISTANT and (CROPS_WINDOWS or not getattr(model.config, "sliding_window", None)):
        alone = {**greedy, "input_ids": tokens(1, 7), "attention_mask": torch.ones(1, 7, dtype=torch.long)}
        assert torch.equal(pruned.generate(**alone, assistant_model=model), pruned.generate(**alone))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_cache_holds_what_is_counted_for_it(family):
    model, pruned, _ = pruned_pair(family, PLANS["whole group, keep one"])
    for found in (model, pruned):
        cache = found(tokens(1, 3), use_cache=True).past_key_values  # three tokens are within every window
        held = sum(states.numel() for layer in cache.layers for states in (layer.keys, layer.values))
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
    assert torch.equal(hidden(again, **padded()), hidden(twice, **padded()))


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
