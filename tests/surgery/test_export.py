"""Exports: the unmodified classes and GGUF files hold what the pruned model is."""

import copy
import json

import numpy as np
import pytest
import torch
import transformers
from tiny_decoders import decoder
from tiny_encoders import ENCODERS, SEQ2SEQ, VISION
from tiny_models import bert, llama, tokens
from tiny_vision_language import VISION_LANGUAGE

from headprune.errors import InvalidInput, UnsupportedModel
from headprune.models import attention_sites
from headprune.nn.replace import own_attention
from headprune.planning import Budget, plan
from headprune.scoring import score
from headprune.surgery import cut, load, prune, save
from headprune.surgery.export import export, regularise, targets
from headprune.surgery.export.slots import in_groups
from headprune.surgery.export.stock import stock_model

RAGGED = {"model.layers.0.self_attn": [0, 1, 2, 5], "model.layers.1.self_attn": [0, 3, 6]}


def ragged_llama(**options):
    model = llama(**options)
    cut(model, RAGGED)
    return model


def ragged_bert():
    model = bert()
    cut(model, {"encoder.layer.0.attention": [1], "encoder.layer.1.attention": [0, 2, 3]})
    return model


def output_of(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tokens())[0]


def test_a_compiled_model_is_exported_as_what_it_was_compiled_from(tmp_path):
    export(torch.compile(ragged_llama()), "stock", tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize("make", [ragged_llama, lambda: llama(), ragged_bert], ids=["ragged", "dense", "bert"])
def test_regularising_makes_groups_equal_and_changes_no_output(make):
    model = make()
    expected = output_of(model)
    found = regularise(model)
    assert all(site.head_map.is_uniform for site in attention_sites(model))
    assert torch.allclose(output_of(model), expected, atol=1e-5)
    assert (found.layers == 0) == (found.parameters == 0)


@pytest.mark.parametrize("family", ["qwen3_next", "afmoe", "laguna"])
def test_an_attention_without_heads_gets_a_dead_head_with_its_gate(family):
    model = decoder(family)
    names = [site.name for site in attention_sites(model)]
    cut(model, {names[-1]: []} if len(names) > 1 else {names[0]: [0]})
    expected = output_of(model)
    regularise(model)
    assert all(site.head_map.query_heads for site in attention_sites(model))
    assert torch.allclose(output_of(model), expected, atol=1e-5)


def test_a_vision_tower_whose_attentions_join_their_heads_by_width_gets_dead_heads():
    model = VISION_LANGUAGE["janus"].make()
    batch, names = VISION_LANGUAGE["janus"].batch("left"), [site.name for site in attention_sites(model)]
    cut(model, {names[0]: []})
    with torch.no_grad():
        expected = model(**batch)[0]
        regularise(model)
        assert torch.allclose(model(**batch)[0], expected, atol=1e-5)


def test_what_a_layer_reads_of_its_config_is_saved_again(tmp_path):
    """A folder with dead heads is built from its layout, by another class of layer config than a cut's."""
    model = SEQ2SEQ["moonshine"].make()
    batch, names = SEQ2SEQ["moonshine"].batch("left"), [site.name for site in attention_sites(model)]
    cut(model, {names[0]: [0, 1], names[1]: []})
    with torch.no_grad():
        expected = model(**batch).logits
        regularise(model)
        save(model, tmp_path / "once")
        save(load(tmp_path / "once"), tmp_path / "twice")
        assert torch.allclose(load(tmp_path / "twice")(**batch).logits, expected, atol=1e-5)


def test_a_model_that_ran_before_is_saved_with_its_layout(tmp_path):
    """transformers leaves hooks on the layers of some models when they first run."""
    model = ENCODERS["wav2vec2_conformer"].make()
    with torch.no_grad():
        cut(model, {attention_sites(model)[0].name: [1]})
        expected = model(**ENCODERS["wav2vec2_conformer"].batch("left")).logits
        save(model, tmp_path / "pruned")
        assert json.loads((tmp_path / "pruned" / "config.json").read_text())["headprune"]["layout"]
        model.wav2vec2_conformer.encoder.layers[0].register_forward_hook(lambda *_: None)
        regularise(model, {site.name: in_groups(site.head_map, 1, 4) for site in attention_sites(model)})
        with pytest.raises(UnsupportedModel, match="would not load again"):
            save(model, tmp_path / "even")
        assert torch.allclose(model(**ENCODERS["wav2vec2_conformer"].batch("left")).logits, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (VISION_LANGUAGE["internvl"].make, "does not run on the small input that an export is checked by: Image features"),
        (ENCODERS["convbert"].make, r"query\.weight went with the last head of its attention"),
    ],
    ids=["internvl", "convbert"],
)
def test_what_cannot_become_stock_says_why(make, told, tmp_path):
    model = make()
    cut(model, {attention_sites(model)[1].name: []}, verify=False)
    with pytest.raises(UnsupportedModel, match=told):
        export(model, "stock", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_config_whose_widths_are_those_of_stages_becomes_stock_again(tmp_path):
    model, batch = VISION["mobilevit"].make(), VISION["mobilevit"].batch("left")
    cut(model, {attention_sites(model)[0].name: [1]})
    with torch.no_grad():
        expected = model(**batch).logits
        export(model, "stock", tmp_path / "out")
        found = type(VISION["mobilevit"].make()).from_pretrained(tmp_path / "out").eval()
        assert torch.allclose(found(**batch).logits, expected, atol=1e-4)


@pytest.mark.parametrize("family", ["gpt_oss", "cohere"])
def test_what_heads_own_beside_their_projections_follows_them(family):
    """Sinks, and a norm of each head."""
    model = decoder(family)
    cut(model, {site.name: heads for site, heads in zip(attention_sites(model), ([0, 1, 3], [2]))})
    expected = output_of(model)
    assert regularise(model).layers
    assert all(site.head_map.is_uniform for site in attention_sites(model))
    assert torch.allclose(output_of(model), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "reason"),
    [("olmo2", "picks its heads out of something made for all"), ("stablelm", "a module of its own for each head")],
)
@pytest.mark.parametrize("kept", [[0, 1, 3], []], ids=["ragged", "emptied"])
def test_heads_that_are_more_than_weights_are_not_made_even(family, reason, kept):
    model = decoder(family)
    cut(model, {attention_sites(model)[0].name: kept})
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UnsupportedModel, match=rf"{reason}.* dead heads cannot be added\. Export to stock"):
        regularise(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("make", [ragged_llama, ragged_bert], ids=["llama", "bert"])
def test_stock_loads_in_the_unmodified_class(make, tmp_path):
    model = make()
    expected, before = output_of(model), copy.deepcopy(model.state_dict())
    report = export(model, "stock", tmp_path / "out")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    found = (
        getattr(transformers, type(llama() if make is ragged_llama else bert()).__name__).from_pretrained(tmp_path / "out").eval()
    )
    assert torch.allclose(output_of(found), expected, atol=1e-5)
    assert "dead heads" in str(report)


@pytest.mark.parametrize(
    "family", ["gpt2", "gpt_neox", "qwen3", "phi3", "bloom", "deepseek_v3", "gpt_oss", "cohere", "olmo2", "stablelm"]
)
@pytest.mark.parametrize("kept", [[2], []], ids=["ragged", "emptied"])
def test_other_families_become_stock_again(family, kept, tmp_path):
    model = decoder(family)
    names = [site.name for site in attention_sites(model)]
    cut(model, {names[0]: [0, 1, 3], names[1]: kept})
    expected = output_of(model)
    export(model, "stock", tmp_path / "out")
    found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert "headprune" not in type(found).__module__
    assert torch.allclose(output_of(found), expected, atol=1e-4)


def test_a_half_precision_model_that_was_read_becomes_stock_again(tmp_path):
    """As `from_pretrained` leaves it: weights of bf16, frequencies of rotary positions of fp32."""
    save(ragged_llama().to(torch.bfloat16), tmp_path / "saved")
    model = load(tmp_path / "saved")
    frequencies = model.model.rotary_emb.inv_freq
    assert frequencies.dtype == torch.float32
    stock, notes = stock_model(model)
    assert torch.equal(stock.model.rotary_emb.inv_freq, frequencies)
    assert {parameter.dtype for parameter in stock.parameters()} == {torch.bfloat16}
    assert "LlamaForCausalLM = the model" in notes[-1]


def test_a_model_that_points_at_answers_becomes_stock_again(tmp_path):
    model = transformers.BertForQuestionAnswering(bert().config).eval()
    cut(model, {"bert.encoder.layer.0.attention": [1]})
    with torch.no_grad():
        expected = model(input_ids=tokens()).end_logits
    export(model, "stock", tmp_path / "out")
    found = transformers.BertForQuestionAnswering.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        assert torch.allclose(found(input_ids=tokens()).end_logits, expected, atol=1e-5)


@pytest.mark.parametrize("kept", [[0, 2, 3], []], ids=["fewer", "emptied"])
def test_siglip_becomes_stock_again_with_the_torch_attention_that_pools_its_picture(kept, tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {**sizes, "vocab_size": 60, "max_position_embeddings": 8, "projection_size": 32, "bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(0)
    config = transformers.SiglipConfig(text_config=text, vision_config={**sizes, "image_size": 16, "patch_size": 8})
    model = transformers.SiglipModel(config).eval()
    with own_attention(model):
        names = [site.name for site in attention_sites(model)]
    assert names[-1] == "vision_model.head.attention"
    cut(model, {name: [1, 2] for name in names[:-1]} | {names[-1]: kept})
    batch = {"input_ids": torch.arange(1, 13).view(2, 6), "pixel_values": torch.randn(2, 3, 16, 16)}
    with torch.no_grad():
        expected = model(**batch).logits_per_image
    export(model, "stock", tmp_path / "out")
    found = transformers.SiglipModel.from_pretrained(tmp_path / "out").eval()
    assert type(found.vision_model.head.attention) is torch.nn.MultiheadAttention
    with torch.no_grad():
        assert torch.allclose(found(**batch).logits_per_image, expected, atol=1e-5)


@pytest.mark.parametrize("family", ["vit", "clip"])
def test_towers_become_stock_again(family, tmp_path):
    made = VISION[family]
    model = made.make()
    cut(model, {site.name: [0, 2] for site in attention_sites(model)})
    batch = made.batch("right")
    with torch.no_grad():
        expected = model(**batch)
    export(model, "stock", tmp_path / "out")
    found = getattr(transformers, made.model).from_pretrained(tmp_path / "out").eval()
    heads = {site.head_map.query_heads for site in attention_sites(found)}
    assert heads == {"vit": {2}, "clip": {4}}[family]
    name = "logits" if family == "vit" else "logits_per_image"
    with torch.no_grad():
        assert torch.allclose(found(**batch)[name], expected[name], atol=1e-5)


def test_gguf_holds_each_layers_counts_and_weights(tmp_path):
    gguf = pytest.importorskip("gguf")
    model = ragged_llama()
    export(model, "gguf", tmp_path / "model.gguf", dtype="f32")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {one.name: np.array(one.data) for one in reader.tensors}
    assert fields["general.architecture"] == "deci"
    counts = fields["deci.attention.head_count"]
    width = tensors["blk.0.attn_q.weight"].shape[0] // counts[0]
    assert [tensors[f"blk.{layer}.attn_q.weight"].shape[0] for layer in (0, 1)] == [width * count for count in counts]
    kv = fields["deci.attention.head_count_kv"]
    assert all(query % count == 0 for query, count in zip(counts, kv))
    mlp = model.model.layers[1].mlp.up_proj.weight.detach().numpy()
    assert np.array_equal(tensors["blk.1.ffn_up.weight"], mlp)


def test_qwen3_without_tied_embeddings_becomes_gguf_where_it_was_planned_as_told(tmp_path):
    pytest.importorskip("gguf")
    model = decoder("qwen3", tie_word_embeddings=False)
    scores, differing = score(model, criterion="random"), copy.deepcopy(model)
    cut(differing, {"model.layers.0.self_attn": [0]})
    with pytest.raises(UnsupportedModel, match=r"or plan with target='stock'"):
        export(differing, "gguf", tmp_path / "model.gguf")
    prune(model, plan(scores, Budget(heads=0.5), target="stock"))
    assert "architecture qwen3" in export(model, "gguf", tmp_path / "model.gguf").notes[0]


def test_an_attention_without_heads_but_with_an_output_bias_is_no_no_op_in_gguf(tmp_path):
    gguf = pytest.importorskip("gguf")
    counts = {}
    for biased in (False, True):
        model = llama(layers=3, attention_bias=biased)
        if biased:
            model.model.layers[1].self_attn.o_proj.bias.data.normal_()
        cut(model, {**RAGGED, "model.layers.1.self_attn": []})
        export(model, "gguf", tmp_path / f"{biased}.gguf")
        fields = gguf.GGUFReader(tmp_path / f"{biased}.gguf").fields
        counts[biased] = fields["deci.attention.head_count"].contents()[1]
    assert counts == {False: 0, True: 1}


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_oss", "cohere", "deepseek_v3", "gemma3"])
def test_vllm_gets_a_folder_of_equal_groups_that_loads(family, tmp_path):
    model = decoder(family)
    cut(model, {site.name: heads for site, heads in zip(attention_sites(model), ([0, 1, 3], []))})
    expected = output_of(model)
    export(model, "vllm", tmp_path / "out")
    found = load(tmp_path / "out")
    assert all(site.head_map.is_uniform for site in attention_sites(found))
    assert torch.allclose(output_of(found), expected, atol=1e-5)


@pytest.mark.parametrize("target", ["stock", "vllm", "nemotron-nas", "gguf"])
def test_adapters_are_to_be_merged_before_an_export(target, tmp_path):
    """save_pretrained would write them in place of the model."""
    peft = pytest.importorskip("peft")
    model, config = ragged_llama(), peft.LoraConfig(target_modules=["gate_proj"])
    with pytest.raises(UnsupportedModel, match=r"Call merge_and_unload\(\) and export what it returns"):
        export(peft.get_peft_model(ragged_llama(), config), target, tmp_path / "out")
    model.add_adapter(config)
    with pytest.raises(UnsupportedModel, match=r"Call merge_and_unload\(\) and export what it returns"):
        export(model, target, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_exported_is_refused_and_nothing_is_written(tmp_path):
    with pytest.raises(InvalidInput, match="unknown export target 'gguff'"):
        export(llama(), "gguff", tmp_path / "out")
    with pytest.raises(InvalidInput, match="unknown export option"):
        export(llama(), "stock", tmp_path / "out", dtype="f32")
    with pytest.raises(UnsupportedModel, match="not a transformers model"):
        export(torch.nn.Linear(2, 2), "stock", tmp_path / "out")
    with pytest.raises(InvalidInput, match="output is None; expected a path"):
        export(llama(), "stock", None)
    with pytest.raises(InvalidInput, match="to is 3; expected a string"):
        export(llama(), 3, tmp_path / "out")
    pytest.importorskip("gguf")
    with pytest.raises(UnsupportedModel, match="gguf is written for"):
        export(bert(), "gguf", tmp_path / "out")
    with pytest.raises(UnsupportedModel, match=r"use 'gelu'; llama\.cpp computes silu"):
        export(llama(hidden_act="gelu"), "gguf", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    assert {"stock", "onnx", "gguf", "vllm"} <= set(targets())
