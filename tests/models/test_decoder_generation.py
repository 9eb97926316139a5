"""Pruned decoders in the ways of generating that allocate or follow a cache otherwise: ahead of time, in chunks, in beams, with
windows in some layers; their first or last attention emptied."""

import copy

import pytest
import torch
import transformers
from tiny_decoders import decoder
from tiny_models import padded, tokens
from transformers import configuration_utils

import headprune as hp

MIXED = {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]}
HYBRID = {"num_hidden_layers": 4, "layer_types": ["linear_attention", "full_attention"] * 2}
MODELS = {
    "llama": {"num_hidden_layers": 3}, "gpt2": {"n_layer": 3}, "phi3": {"num_hidden_layers": 3}, "gemma3": MIXED,
    "qwen3_next": HYBRID,
}  # fmt: skip
# What is kept in some layers; three of four heads in the others.
PLANS = {"first emptied": {0: [], 1: [2]}, "last emptied": {-1: [], 1: [1, 3]}}
STATIC = {"cache_implementation": "static", "disable_compile": True}
WAYS = {
    "dynamic": {},
    "beams, static": {"num_beams": 2, **STATIC},
    "chunks": {"prefill_chunk_size": 3},
    "chunks, static": {"prefill_chunk_size": 3, **STATIC},  # allocates all layers before the first token
}
AHEAD = hasattr(configuration_utils, "get_head_shapes")  # earlier releases make static caches of one size for that


def pruned_pair(name: str, keep):
    model = decoder(name, **MODELS[name])
    sites, pruned = hp.attention_sites(model), copy.deepcopy(model)
    plan = {site.name: [0, 1, 2] for site in sites} | {sites[layer].name: heads for layer, heads in keep.items()}
    hp.cut(pruned, plan)
    return model, pruned, plan


@pytest.mark.parametrize("keep", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("name", MODELS)
def test_it_generates_what_the_gated_model_does(name, keep):
    model, pruned, plan = pruned_pair(name, keep)
    for way, options in WAYS.items():
        if way == "chunks, static" and not AHEAD:
            continue
        # Longer than the windows of four; chunks come without padding.
        batch = {"input_ids": tokens(1, 7)} if "chunks" in way else padded(side="left")
        options = {**batch, "max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0, **options}
        with hp.gated(model, plan):
            expected = model.generate(**options)
        assert torch.equal(pruned.generate(**options), expected), way


@pytest.mark.skipif(not AHEAD, reason="this transformers makes static caches of one size")
@pytest.mark.parametrize("keep", PLANS.values(), ids=PLANS)
def test_transformers_own_export_recipe_allocates_the_cache_of_each_layer(keep):
    recipes = pytest.importorskip("transformers.integrations.executorch")
    _, pruned, _ = pruned_pair("llama", keep)
    pruned.generation_config = transformers.GenerationConfig(
        use_cache=True, cache_implementation="static", cache_config={"batch_size": 1, "max_cache_len": 16}
    )
    ids = tokens(1, 1)
    with torch.no_grad():
        expected = pruned(ids).logits
        module = recipes.TorchExportableModuleWithStaticCache(pruned, batch_size=1, max_cache_len=16, device=torch.device("cpu"))
        assert torch.allclose(module(input_ids=ids, cache_position=torch.tensor([0])), expected, atol=1e-5)
