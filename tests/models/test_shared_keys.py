"""Gemma 3n and Gemma 4 whose last layers read the keys and values of an earlier layer of the same kind."""

import copy
import logging
import random
import shutil

import pytest
import torch
import transformers
from tiny_decoders import FAMILIES, GEMMA4, MIXED, SHARED, VOCABULARY, decoder
from tiny_models import hidden, padded, tokens
from transformers import StaticCache

import headprune as hp
from headprune.evaluation.cost import attention_flops, kv_cache_bytes_per_token
from headprune.evaluation.estimate import cost_of
from headprune.evaluation.sequence_flops import Lengths
from headprune.models import attention_sites, gated
from headprune.models.site import AttentionSite
from headprune.planning.latency_table import key_of
from headprune.recovery.distillation import Distillation, relation_sites
from headprune.scoring.criterion import criteria
from headprune.surgery import cut
from headprune.surgery.export import export
from headprune.surgery.export.regularise import regularise

SHARING = [family for family in ("gemma3n_shared", "gemma4_shared") if family in FAMILIES]
# Two layers of their own, two whose keys and values others read, and four that read them.
LAYERS = {"num_hidden_layers": 8, "num_kv_shared_layers": 4, "layer_types": MIXED * 4}
NAMES = [f"model.layers.{layer}.self_attn" for layer in range(8)]
PLANS = {
    "ragged": [[0, 1, 3], [0, 2, 3], [0, 1, 3], [1, 2, 3], [0], [2, 3], [0, 3], [0, 1, 2]],
    "whole groups": [[2, 3], [0, 1], [2, 3], [0, 1], [0, 1], [2, 3], [0, 1, 2, 3], [0, 1]],
    "none where they are made": [[0, 1], [], [], [], [1, 2, 3], [2], [0, 1, 2, 3], [0, 2]],
    "none where they are read": [[1], [0, 2], [3], [0, 1, 2, 3], [], [], [0, 3], []],
}


def large(family: str, **options):
    return decoder(family, **LAYERS, **options)


def sites_of(model) -> dict[str, AttentionSite]:
    return {site.name: site for site in attention_sites(model)}


def pruned_pair(family: str, keep):
    """(whole model, pruned copy, plan)"""
    model = large(family)
    plan, pruned = dict(zip(NAMES, keep)), copy.deepcopy(model)
    cut(pruned, plan)
    return model, pruned, plan


@pytest.mark.parametrize("family", SHARING)
def test_every_layer_is_a_site_and_those_that_share_own_no_keys(family):
    sites = sites_of(large(family))
    assert list(sites) == NAMES
    assert [site.own_keys for site in sites.values()] == [True] * 4 + [False] * 4
    assert [site.head_map.kv_stay for site in sites.values()] == [False] * 2 + [True] * 6
    assert {str(site.head_map) for site in sites.values()} == {"4q/2kv"}
    assert all(site.proven for site in sites.values())
    for site in sites.values():
        owned = [name for name in ("q_proj", "k_proj", "v_proj", "o_proj") if getattr(site.module, name, None) is not None]
        weights = sum(getattr(site.module, name).weight.numel() for name in owned)
        assert site.parameters() == weights
    with pytest.raises(hp.InvalidInput, match="those of an earlier attention"):
        sites[NAMES[4]].projection("key")


@pytest.mark.parametrize("family", ["gemma3n", "gemma4"])
def test_without_sharing_layers_lose_key_value_heads_like_any_others(family):
    if family not in FAMILIES:
        pytest.skip("this release wants torchvision for it")
    model = decoder(family)
    cut(model, {NAMES[0]: [2, 3], NAMES[1]: []})
    assert [site.head_map.kv_heads for site in attention_sites(model)] == [1, 0]


@pytest.mark.parametrize("keep", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("family", SHARING)
def test_cutting_equals_gating(family, keep):
    model, pruned, plan = pruned_pair(family, keep)
    for implementation in ("eager", "sdpa", "headprune"):
        for found in (model, pruned):
            found.set_attn_implementation(implementation)
        for side in ("left", "right"):
            with gated(model, plan):
                expected = hidden(model, **padded(side=side))
            assert torch.allclose(hidden(pruned, **padded(side=side)), expected, atol=1e-4)
        assert not torch.allclose(hidden(model, **padded(side=side)), expected, atol=1e-2), "the removed heads did nothing"


@torch.no_grad()
def steps(model, ids: torch.Tensor, cache) -> torch.Tensor:
    """Logits of a prefill of seven tokens, of three more at once and then of one at a time."""
    parts = ids.split([7, 3, *[1] * (ids.shape[1] - 10)], dim=1)
    return torch.cat([model(part, past_key_values=cache, use_cache=True).logits for part in parts], dim=1)


@pytest.mark.parametrize("keep", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("family", SHARING)
def test_with_a_cache_it_goes_on_as_the_gated_model_does(family, keep):
    """Beyond the sliding window of four."""
    model, pruned, plan = pruned_pair(family, keep)
    ids = tokens(2, 14)
    for implementation in ("eager", "sdpa", "headprune"):
        for found in (model, pruned):
            found.set_attn_implementation(implementation)
        with gated(model, plan):
            whole = model(ids).logits
            expected = steps(model, ids, transformers.DynamicCache(config=model.config))
        assert torch.allclose(expected, whole, atol=1e-4)
        cache = transformers.DynamicCache(config=pruned.config)
        assert torch.allclose(steps(pruned, ids, cache), expected, atol=1e-4)
        assert torch.allclose(steps(pruned, ids, StaticCache(config=pruned.config, max_cache_len=20)), expected, atol=1e-4)


@pytest.mark.parametrize("family", SHARING)
def test_layers_that_read_keys_may_see_the_last_tokens_alone(family):
    """Gemma 4 gives those layers no more of a prefill than the logits ask for; without a mask nothing says which tokens."""
    model = large(family)
    for length in (12, 3):  # the shorter one is within the window
        ids = tokens(2, length)
        for count in (1, 2, 3):
            found = []
            for implementation in ("eager", "headprune"):
                model.set_attn_implementation(implementation)
                for cache in (
                    None,
                    transformers.DynamicCache(config=model.config),
                    StaticCache(config=model.config, max_cache_len=20),
                ):
                    with torch.no_grad():
                        logits = model(ids, logits_to_keep=count, past_key_values=cache, use_cache=cache is not None).logits
                    assert logits.shape[1] == count
                    found.append(logits)
            assert all(torch.allclose(one, found[0], atol=1e-4) for one in found), (length, count)


@pytest.mark.parametrize("keep", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("family", SHARING)
def test_it_survives_the_disk(family, keep, tmp_path):
    _, pruned, _ = pruned_pair(family, keep)
    hp.save(pruned, tmp_path / "model")
    expected = hidden(pruned, **padded())
    options = {"attn_implementation": pruned.config._attn_implementation}
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", trust_remote_code=True, **options)
    for found in (hp.load(tmp_path / "model", **options), stock):
        assert torch.allclose(hidden(found, **padded()), expected, atol=1e-5)
        heads = {name: site.head_map for name, site in sites_of(found).items()}
        assert heads == {name: site.head_map for name, site in sites_of(pruned).items()}


@pytest.mark.parametrize("family", SHARING)
def test_the_check_before_a_cut_reaches_every_layer_in_half_precision_too(family, caplog):
    model = large(family).to(torch.bfloat16)
    with caplog.at_level(logging.WARNING, logger="headprune"):
        cut(model, dict(zip(NAMES, PLANS["ragged"])))
    assert caplog.messages == []


@pytest.mark.parametrize("family", SHARING)
def test_key_value_heads_that_others_read_are_paid_for_until_the_end(family):
    for keep in PLANS.values():
        model, pruned, plan = pruned_pair(family, keep)
        chosen = hp.PruningPlan.from_keep(model, plan)
        before, after = (sum(parameter.numel() for parameter in found.parameters()) for found in (model, pruned))
        assert chosen.removed_parameters == before - after
        report = hp.prune(copy.deepcopy(model), chosen, dry_run=True).savings
        assert report.parameters == (before, after)
        sites = attention_sites(pruned)
        cache = pruned(tokens(1, 3), use_cache=True).past_key_values
        layers = [layer for layer in cache.layers if getattr(layer, "keys", None) is not None]
        placeholders = sum(2 for site in sites if site.own_keys and not site.head_map.kv_heads)
        held = sum(states.numel() for layer in layers for states in (layer.keys, layer.values)) // 3 - placeholders
        assert kv_cache_bytes_per_token(sites, bytes_per_value=1) == held
        assert report.cache_bytes[1] == 4 * held
        budget = hp.Budget(flops=0.5, sequence_length=16)
        planned = sum(budget.cost(shape, chosen.head_map(name)) for name, shape in chosen.shapes.items())
        assert planned == attention_flops(sites, 16)
        assert cost_of(pruned, Lengths(16, 16), torch.float32, {}).kv_heads == sum(site.head_map.kv_heads for site in sites[:4])


@pytest.mark.parametrize("family", SHARING)
def test_budgets_are_met_where_there_is_something_to_save(family):
    model = large(family)
    scores = hp.score(model, (), "random")
    full = {name: shape.cache.of(shape.head_map) for name, shape in scores.shapes.items()}
    for allocation in ("global", "optimal"):
        chosen = hp.plan(scores, hp.Budget(kv_cache=0.2), allocation=allocation)
        assert all(len(chosen[name]) == 4 for name in NAMES[2:]), "heads of these free no cache"
        left = sum(shape.cache.of(chosen.head_map(name)) for name, shape in chosen.shapes.items())
        assert left <= 0.8 * sum(full.values())
    with pytest.raises(hp.InfeasibleBudget, match="nearest budget that can be met"):
        hp.plan(scores, hp.Budget(kv_cache=0.5))
    for budget in (hp.Budget(heads=0.5), hp.Budget(params=0.4), hp.Budget(flops=0.4)):
        pruned = copy.deepcopy(model)
        chosen = hp.plan(scores, budget)
        hp.prune(pruned, chosen)
        spent = sum(budget.cost(shape, sites_of(pruned)[name].head_map) for name, shape in scores.shapes.items())
        whole = sum(budget.cost(shape, shape.head_map) for shape in scores.shapes.values())
        assert spent <= (1 - budget.fraction) * whole


@pytest.mark.parametrize("family", SHARING)
def test_a_latency_table_times_layers_that_share_apart_from_others(family):
    shapes = hp.score(large(family), (), "random").shapes
    kinds = [{key_of(shapes[name]) for name in NAMES[start:stop]} for start, stop in ((0, 2), (2, 4), (4, 8))]
    assert len(set.union(*kinds)) == sum(len(kind) for kind in kinds)


@pytest.mark.parametrize(
    ("target", "granularity"),
    [("llama.cpp", "query_head"), ("llama.cpp", "kv_group"), ("vllm", "query_head"), ("vllm", "kv_group"), ("stock", "query_head")],
)
def test_plans_for_engines_keep_groups_even_where_key_value_heads_stay(target, granularity):
    scores = hp.score(large("gemma4_shared"), (), "random")
    chosen = hp.plan(scores, hp.Budget(heads=0.4), target=target, granularity=granularity)
    assert chosen.removed_heads
    assert all(chosen.head_map(name).is_uniform for name in chosen)


@pytest.mark.parametrize("family", SHARING)
def test_every_criterion_scores_every_layer(family):
    model = decoder(family)
    ids = [tokens(2, 8, seed=seed) for seed in range(3)]
    names = [name for name in criteria() if name not in ("movement", "confidence_ordinary")]
    scores = hp.score(model, [{"input_ids": one, "labels": one} for one in ids], names)
    for name, found in scores.items():
        assert list(found) == NAMES[:4]
        assert all(values.isfinite().all() for values in found.values()), name
    rows = hp.observe(model, (), {"weights"})[NAMES[2]]
    assert not rows.weight_l1[1:3].any()
    assert rows.weight_l1[[0, 3]].all()


@pytest.mark.parametrize("family", SHARING)
def test_switching_a_head_off_is_measured_from_where_it_is(family):
    """Passes that start again in the middle have the keys and values that earlier layers made."""
    model, batch = large(family), {"input_ids": tokens(2, 8), "labels": tokens(2, 8)}
    scores = hp.score(model, [batch], "ablation")
    with torch.no_grad():
        whole = model(**batch).loss
        for name in (NAMES[0], NAMES[3], NAMES[5], NAMES[7]):
            with gated(model, {name: [0, 2, 3]}):
                assert scores[name][1] == pytest.approx(float(model(**batch).loss - whole), abs=1e-4)


@pytest.mark.parametrize("family", SHARING)
def test_gradients_are_the_same_when_layers_run_twice(family):
    model, batch = large(family), {"input_ids": tokens(2, 8), "labels": tokens(2, 8)}
    once, twice = (hp.score(model, [batch], "gate_gradient", checkpointing=again) for again in (False, True))
    for name in NAMES:
        assert torch.allclose(once[name], twice[name], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("family", SHARING)
def test_compensation_lowers_the_error(family):
    model = large(family)
    calibration = [{"input_ids": tokens(6, 30, seed=seed)} for seed in range(8)]
    keep = dict(zip(NAMES, PLANS["ragged"]))
    plan = hp.PruningPlan.from_keep(model, keep)
    plain, solved = copy.deepcopy(model), copy.deepcopy(model)
    hp.prune(plain, plan)
    report = hp.prune(solved, plan, calibration)
    assert [one.site for one in report] == NAMES
    batch = {"input_ids": tokens(4, 30, seed=99)}
    errors = [float((hidden(found, **batch) - hidden(model, **batch)).square().mean()) for found in (plain, solved)]
    assert errors[1] < errors[0]


@pytest.mark.parametrize("family", SHARING)
def test_relations_are_those_of_the_last_layer_with_keys(family):
    sites = attention_sites(large(family))
    assert relation_sites(Distillation(relations=1.0), sites) == {kind: [NAMES[3]] for kind in ("query", "key", "value")}
    with pytest.raises(hp.InvalidInput, match="name that one in relation_sites"):
        relation_sites(Distillation(relations=1.0, relation_sites=[NAMES[5]]), sites)


@pytest.mark.parametrize("family", SHARING)
def test_on_disk_it_is_scored_cut_and_solved_layer_by_layer(family, tmp_path):
    model = large(family)
    hp.save(model, tmp_path / "model")
    plan = hp.PruningPlan.from_keep(model, dict(zip(NAMES, PLANS["none where they are made"])))
    batches = [{"input_ids": tokens(4, 30), "labels": tokens(4, 30)}]
    found, expected = (hp.score(one, batches, "fisher") for one in (hp.open_streamed(tmp_path / "model"), model))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    for data in (None, batches):
        pruned = copy.deepcopy(model)
        hp.prune(pruned, plan, data)
        shutil.rmtree(tmp_path / "pruned", ignore_errors=True)
        hp.prune_folder(tmp_path / "model", plan, tmp_path / "pruned", data)
        again = hp.load(tmp_path / "pruned").state_dict()
        assert all(torch.equal(again[name], tensor) for name, tensor in pruned.state_dict().items())


@pytest.mark.parametrize("family", SHARING)
def test_it_goes_back_into_the_stock_class_but_takes_no_dead_heads_elsewhere(family, tmp_path):
    model, pruned, _ = pruned_pair(family, PLANS["ragged"])
    export(pruned, "stock", tmp_path / "stock")
    dense = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "stock").eval()
    assert type(dense) is type(model)
    assert torch.allclose(hidden(dense, **padded()), hidden(pruned, **padded()), atol=1e-4)
    with pytest.raises(hp.UnsupportedModel, match="dead heads cannot be added"):
        regularise(pruned)
    even = copy.deepcopy(model)
    cut(even, {name: [0, 2] for name in NAMES})
    assert regularise(even).layers == 0


@pytest.mark.parametrize("family", SHARING)
def test_random_plans_train_and_compose(family):
    drawn = random.Random(family)
    for _ in range(3):
        first = [sorted(drawn.sample(range(4), drawn.randint(1, 4))) for _ in NAMES]
        second = [sorted(drawn.sample(range(len(heads)), drawn.randint(0, len(heads)))) for heads in first[:-1]] + [[0]]
        model, twice, _ = pruned_pair(family, first)
        cut(twice, dict(zip(NAMES, second)))
        once = [[heads[index] for index in again] for heads, again in zip(first, second)]
        pruned = copy.deepcopy(model)
        cut(pruned, dict(zip(NAMES, once)))
        twice.set_attn_implementation("headprune")
        pruned.set_attn_implementation("headprune")
        assert torch.allclose(hidden(twice, **padded()), hidden(pruned, **padded()), atol=1e-4)
        loss = pruned(input_ids=tokens(), labels=tokens()).loss
        loss.backward()
        # Where heads read keys and values, what makes them learns.
        for giver, readers in ((2, (2, 4, 6)), (3, (3, 5, 7))):
            gradient = sites_of(pruned)[NAMES[giver]].projection("key").module.weight.grad
            read = any(once[reader] for reader in readers)
            assert bool(gradient is not None and gradient.any()) == read


def test_the_language_model_under_a_vision_tower_shares_too():
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "head_dim": 8}
    vision |= {"num_key_value_heads": 2, "patch_size": 4, "position_embedding_size": 16, "pooling_kernel_size": 2}
    config = transformers.Gemma4Config(text_config={**GEMMA4, **SHARED}, vision_config=vision, audio_config=None)
    torch.manual_seed(0)
    model = transformers.Gemma4ForConditionalGeneration(config).eval()
    plan = {f"model.language_model.layers.{layer}.self_attn": keep for layer, keep in enumerate(([], [2, 3], [0, 1, 3], []))}
    pruned = copy.deepcopy(model)
    hp.prune(pruned, hp.PruningPlan.from_keep(pruned, plan))
    for found in (model, pruned):
        found.set_attn_implementation("headprune")
    greedy = {**padded(side="left"), "max_new_tokens": 6, "do_sample": False}
    with gated(model, plan):
        assert torch.equal(pruned.generate(**greedy), model.generate(**greedy))
    for count in (1, 3):
        found = []
        for implementation in ("eager", "headprune"):
            model.set_attn_implementation(implementation)
            cache = StaticCache(config=model.config.get_text_config(), max_cache_len=20)
            with torch.no_grad():
                found.append(model(tokens(2, 3), logits_to_keep=count, past_key_values=cache).logits)
        assert torch.allclose(*found, atol=1e-4)
    labelled = {"input_ids": tokens() % VOCABULARY, "labels": tokens()}
    assert set(plan) <= set(hp.score(pruned, [labelled], "fisher", unreached="keep"))


@pytest.mark.parametrize("family", SHARING)
def test_assisted_decoding_gives_the_same_tokens_with_our_attention(family):
    """There layers that read keys are given several queries behind a cache."""
    for seed in range(4):
        model, assistant = decoder(family, seed=seed), decoder(family, seed=seed + 1)
        model.set_attn_implementation("headprune")
        greedy = {"input_ids": tokens(1, 7), "attention_mask": torch.ones(1, 7), "max_new_tokens": 6, "do_sample": False}
        assert torch.equal(model.generate(**greedy, assistant_model=assistant), model.generate(**greedy))
