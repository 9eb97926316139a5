"""What users do with a pruned model next: adapters, torch.export, torch.compile, quantisation, attention weights."""

import warnings

import pytest
import torch
from tiny_decoders import FAMILIES, decoder
from tiny_encoders import ENCODERS, SEQ2SEQ, VISION
from tiny_models import bert, hidden, llama, tokens

from headprune.errors import UnsupportedModel
from headprune.models import attention_sites, gated
from headprune.models.tiny_inputs import tiny_inputs
from headprune.surgery import cut, load, save

PLANS = {
    "even": {"model.layers.0.self_attn": [0, 1, 6, 7], "model.layers.1.self_attn": [2]},
    "ragged": {"model.layers.0.self_attn": [0, 1, 3, 6], "model.layers.1.self_attn": [2, 4, 5]},
}


@pytest.fixture(params=PLANS)
def pruned(request):
    model = llama()
    cut(model, PLANS[request.param])
    return model


def test_lora_adapters_attach_train_and_merge(pruned, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(pruned, config)
    optimizer = torch.optim.SGD([weight for weight in adapted.parameters() if weight.requires_grad], lr=0.05)
    ids = tokens()
    before = adapted(input_ids=ids, labels=ids).loss
    before.backward()
    optimizer.step()
    assert adapted(input_ids=ids, labels=ids).loss < before
    with pytest.raises(UnsupportedModel, match="merge_and_unload"):
        save(adapted, tmp_path / "adapted")
    expected = hidden(adapted.eval(), input_ids=ids)
    merged = adapted.merge_and_unload()
    assert torch.allclose(hidden(merged, input_ids=ids), expected, atol=1e-4)
    assert save(merged, tmp_path / "merged").is_dir()


def test_what_adapters_learnt_is_saved_loaded_and_pruned_further(tmp_path):
    peft = pytest.importorskip("peft")
    model = llama()
    cut(model, {"model.layers.0.self_attn": [], "model.layers.1.self_attn": [0, 1, 3, 6]})
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj", "o_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config).eval()
    expected = hidden(adapted, input_ids=tokens())
    merged = adapted.merge_and_unload()
    assert torch.allclose(hidden(merged, input_ids=tokens()), expected, atol=1e-4)
    again = load(save(merged, tmp_path / "merged"))
    assert torch.equal(hidden(again, input_ids=tokens()), hidden(merged, input_ids=tokens()))
    plan = {"model.layers.1.self_attn": [1, 2]}
    cut(again, plan)
    with gated(merged, plan):
        assert torch.allclose(hidden(again, input_ids=tokens()), hidden(merged, input_ids=tokens()), atol=1e-5)


def test_adapters_that_transformers_attached_are_refused_too(tmp_path):
    peft = pytest.importorskip("peft")
    model = llama()
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(UnsupportedModel, match="adapters"):
        save(model, tmp_path / "adapted")


def test_a_pruned_model_exports(pruned):
    ids = tokens(batch=2)
    exported = torch.export.export(pruned, (), {"input_ids": ids, "use_cache": False}, strict=False)
    found = exported.module()(input_ids=ids, use_cache=False).logits
    assert torch.allclose(found, hidden(pruned, input_ids=ids), atol=1e-5)


# Families that differ in structure: layouts, positions, norms over all heads, modules by head, latents, two kinds of attention.
DIFFERENT = ["bert", "deberta_v3", "gpt2", "falcon_gqa", "bloom", "olmo2", "gemma3", "qwen3_next", "deepseek_v3", "t5", "swin"]


def emptied(family: str):
    """(a model one of whose attentions has no heads and the others some, an input, what it gives)"""
    model = decoder(family) if family in FAMILIES else {**ENCODERS, **SEQ2SEQ, **VISION}[family].make()
    inputs = tiny_inputs(model) | ({"use_cache": False} if model.can_generate() else {})
    sites = attention_sites(model)
    cut(model, {site.name: [] if index == 1 else [0, 1, 3] for index, site in enumerate(sites)}, verify=False)
    with torch.no_grad():
        return model, inputs, model(**inputs).logits


def compile_anew(model):
    torch._dynamo.reset()  # it counts how often a function was compiled, for whichever model
    return torch.compile(model, backend="eager", fullgraph=True)


@pytest.mark.parametrize("family", DIFFERENT)
def test_other_families_export_with_a_layer_that_has_no_heads(family):
    model, inputs, expected = emptied(family)
    with torch.no_grad():
        exported = torch.export.export(model, (), inputs, strict=False)
        assert torch.allclose(exported.module()(**inputs).logits, expected, atol=1e-5)


@pytest.mark.parametrize("family", DIFFERENT)
def test_other_families_compile_with_a_layer_that_has_no_heads(family):
    model, inputs, expected = emptied(family)
    compiled = compile_anew(model)
    with torch.no_grad():
        assert torch.allclose(compiled(**inputs).logits, expected, atol=1e-5)


def test_a_pruned_model_compiles_without_a_graph_break(pruned):
    ids = tokens(batch=2)
    expected = hidden(pruned, input_ids=ids)
    compiled = compile_anew(pruned)
    with torch.no_grad():
        assert torch.allclose(compiled(input_ids=ids, use_cache=False).logits, expected, atol=1e-5)


FUSED = [
    "gpt2", "gpt_neox", "gpt_bigcode", "bloom", "codegen", "dbrx", "falcon_mqa", "falcon_gqa", "falcon_alibi", "mpt",
    "modernbert_decoder", "persimmon", "phi3",
]  # fmt: skip


def compiled_whole(model):
    """Where experts are chosen while it runs (DBRX) the attentions alone are without a break, of the stock model too."""
    if model.config.model_type != "dbrx":
        return compile_anew(model)
    torch._dynamo.reset()
    for site in attention_sites(model):
        site.module.compile(backend="eager", fullgraph=True)
    return model


@pytest.mark.parametrize("last", [[0, 1, 3], [2, 3]], ids=["ragged", "even"])
@pytest.mark.parametrize("family", FUSED)
def test_one_layer_cut_compiles_without_a_graph_break_from_memory_and_from_disk(family, last, tmp_path):
    model, inputs = decoder(family), {"input_ids": tokens(batch=2), "use_cache": False}
    cut(model, {attention_sites(model)[-1].name: last}, verify=False)
    for found in (model, load(save(model, tmp_path / "pruned"))):
        for implementation in ("headprune", "sdpa") if found._can_set_attn_implementation() else (None,):
            if implementation is not None:
                found.set_attn_implementation(implementation)
            with torch.no_grad():
                expected = found(**inputs).logits
                assert torch.allclose(compiled_whole(found)(**inputs).logits, expected, atol=1e-5), implementation


def dynamically(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch has announced its end
        return torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear})


def by_torchao(model):
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    return model


@pytest.mark.parametrize("quantise", [dynamically, by_torchao])
def test_quantisers_leave_an_emptied_attention_alone(quantise):
    model = llama(attention_bias=True)
    model.model.layers[0].self_attn.o_proj.bias.data.normal_()
    cut(model, {"model.layers.0.self_attn": [], "model.layers.1.self_attn": [0, 1, 3]})
    bias = model.model.layers[0].self_attn.o_proj.bias.detach().clone()
    quantised = quantise(model)
    assert type(quantised.model.layers[1].self_attn.o_proj.weight) is not torch.nn.Parameter
    assert torch.equal(quantised.model.layers[0].self_attn(torch.ones(2, 3, 32))[0], bias.expand(2, 3, 32))
    assert hidden(quantised, input_ids=tokens()).isfinite().all()


@pytest.mark.parametrize("make", [bert, ENCODERS["deberta_v3"].make, SEQ2SEQ["t5"].make, VISION["vit"].make])
def test_attention_weights_keep_their_places(make):
    model = make()
    model.set_attn_implementation("eager")
    inputs = tiny_inputs(model)
    names = ("attentions", "encoder_attentions", "decoder_attentions", "cross_attentions")
    whole = model(**inputs, output_attentions=True)
    cut(model, {attention_sites(model)[0].name: []})
    left = model(**inputs, output_attentions=True)
    for name in names:
        before, after = whole.get(name) or (), left.get(name) or ()
        expected = [[*weights.shape] for weights in before]
        if expected and name in ("attentions", "encoder_attentions"):
            expected[0][1] = 0
        assert [[*weights.shape] for weights in after] == expected
