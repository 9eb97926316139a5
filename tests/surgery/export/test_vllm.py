"""vllm folders: what vLLM's Transformers backend asks of them, read in its source (0.33) and played with transformers alone."""

import inspect
import json

import pytest
import torch
import transformers
from tiny_decoders import decoder
from tiny_models import tokens
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from headprune.errors import UnsupportedModel
from headprune.surgery import cut
from headprune.surgery.checkpoint import load
from headprune.surgery.export import export

KEEP = {0: [0, 1, 2, 5], 1: [0, 3, 6], 2: []}


@pytest.fixture(params=["llama", "qwen3", "mistral"])
def exported(request, tmp_path):
    """(the pruned model, its folder)"""
    options = {"sliding_window": None} if request.param == "mistral" else {}
    model = decoder(request.param, num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=4, head_dim=8, **options)
    cut(model, {f"model.layers.{layer}.self_attn": kept for layer, kept in KEEP.items()})
    export(model, "vllm", tmp_path / "out")
    return model, tmp_path / "out"


def test_the_class_is_the_folders_own_and_dispatches(exported):
    _, folder = exported
    config = json.loads((folder / "config.json").read_text())
    assert not any(hasattr(transformers, name) for name in config["architectures"])
    found = get_class_from_dynamic_module(config["auto_map"]["AutoModel"], folder)
    assert issubclass(found, transformers.PreTrainedModel)
    assert found.is_backend_compatible() or found._can_set_attn_implementation()


def test_an_engines_own_attention_sees_the_counts_of_per_layer_config(exported, monkeypatch):
    model, folder = exported
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert config.is_heterogeneous
    seen = {}

    def engine(module, query, key, value, attention_mask, scaling=None, **_):
        seen[module.layer_idx] = (query.shape[1], key.shape[1], query.shape[3])
        found = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
        return found.transpose(1, 2).contiguous(), None

    monkeypatch.setitem(AttentionInterface._global_mapping, "vllm", engine)
    config._attn_implementation = "vllm"
    built = AutoModel.from_config(config, trust_remote_code=True)
    weights = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    built.load_state_dict(weights.model.state_dict())
    with torch.no_grad():
        found = weights.lm_head(built.eval()(input_ids=tokens(1)).last_hidden_state)
        assert torch.allclose(found, model(input_ids=tokens(1)).logits, atol=1e-4)
    layers = [config.per_layer_config[layer] for layer in range(3)]
    said = {index: (layer.num_attention_heads, layer.num_key_value_heads, config.head_dim) for index, layer in enumerate(layers)}
    assert seen == said
    for layer in built.layers:
        assert "ALL_ATTENTION_FUNCTIONS.get_interface(" in inspect.getsource(type(layer.self_attn).forward)
        assert layer.self_attn.is_causal


def test_a_layer_may_get_more_key_value_heads_than_the_original_had(tmp_path):
    model = decoder("llama", num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4, head_dim=8)
    cut(model, {"model.layers.0.self_attn": [1, 3, 4, 5, 6]})  # groups 1+1+2+1: a fifth key/value head is cheapest
    exported = export(model, "vllm", tmp_path / "out")
    assert "1 repeated key/value heads" in str(exported)
    with torch.no_grad():
        for found in (load(tmp_path / "out"), AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)):
            assert found.model.layers[0].self_attn.k_proj.weight.shape[0] == 5 * 8
            assert torch.allclose(found(input_ids=tokens(1)).logits, model(input_ids=tokens(1)).logits, atol=1e-5)


def test_a_model_that_was_not_pruned_keeps_its_stock_class(tmp_path):
    export(decoder("llama"), "vllm", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert "auto_map" not in config


def test_a_model_that_does_not_dispatch_is_refused(tmp_path):
    with pytest.raises(UnsupportedModel, match="does not dispatch"):
        export(decoder("bloom"), "vllm", tmp_path / "out")
