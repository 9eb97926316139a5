"""Models whose weights are read as they run."""

import json
from dataclasses import replace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from streamed_models import SHARED_LAYERS, SHARING, labelled, quantised_folder, sharded_folder
from tiny_decoders import decoder

import headprune as hp
from headprune.errors import CorruptCheckpoint, InvalidInput, UnsupportedModel
from headprune.models.trunk import enter, trunk_of
from headprune.surgery.export import export


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe"])
def test_a_plain_call_gives_the_same_outputs_and_leaves_no_weights_behind(family, tmp_path):
    folder = sharded_folder(family, tmp_path / "model")
    model, batch = hp.open_streamed(folder), labelled()
    with torch.no_grad():
        found, expected = model(**batch), hp.load(folder)(**batch)
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(found.loss, expected.loss)
    assert all(parameter.is_meta for parameter in model.parameters())


def test_a_pruned_model_streams_too(tmp_path):
    folder = sharded_folder("llama", tmp_path / "model")
    model, batch = hp.load(folder), labelled()
    hp.prune(model, hp.PruningPlan.from_keep(model, {"model.layers.0.self_attn": [1], "model.layers.1.self_attn": [0, 1, 2]}))
    hp.save(model, tmp_path / "pruned")
    with torch.no_grad():
        assert torch.equal(hp.open_streamed(tmp_path / "pruned")(**batch).logits, model(**batch).logits)


def test_the_dtype_can_be_chosen(tmp_path):
    folder = sharded_folder("llama", tmp_path / "model")
    model, batch = hp.open_streamed(folder, dtype=torch.float64), labelled()
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, hp.load(folder, dtype=torch.float64)(**batch).logits)


def test_where_the_config_names_no_dtype_it_is_that_of_the_files(tmp_path):
    folder = sharded_folder("llama", tmp_path / "model")
    hp.load(folder, dtype=torch.bfloat16).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    del config["dtype"]
    (folder / "config.json").write_text(json.dumps(config))
    assert hp.open_streamed(folder).dtype is hp.load(folder).dtype is torch.bfloat16


@pytest.mark.parametrize("stored", ["head", "both"])
def test_of_tied_weights_those_count_that_are_in_the_files(stored, tmp_path):
    """As where the whole model is loaded: both are the one that is there, and two that differ are not tied."""
    decoder("llama", tie_word_embeddings=True).save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    if stored == "head":
        del tensors["model.embed_tokens.weight"]
    save_file(tensors, path, {"format": "pt"})
    model, batch = hp.open_streamed(tmp_path / "model"), labelled()
    with torch.no_grad():
        expected = hp.load(tmp_path / "model")(**batch).logits
        for _ in range(2):
            assert torch.equal(model(**batch).logits, expected)


def test_weights_that_the_files_lack_are_named(tmp_path):
    folder = sharded_folder("llama", tmp_path / "model")
    config = transformers.AutoConfig.from_pretrained(folder)
    config.num_hidden_layers, config.layer_types = 3, None
    config.save_pretrained(folder)
    with pytest.raises(CorruptCheckpoint, match=r"model\.layers\.2\."):
        hp.open_streamed(folder)(**labelled())


def test_weights_of_another_shape_than_the_configs_are_named_before_any_is_read(tmp_path):
    folder = sharded_folder("llama", tmp_path / "model")
    config = transformers.AutoConfig.from_pretrained(folder)
    config.intermediate_size = 40
    config.save_pretrained(folder)
    with pytest.raises(
        CorruptCheckpoint, match=r"asks for model\.layers\.0\.mlp\.\w+\.weight \[.*40.*\]: model-.* holds \[.*48.*\]"
    ):
        hp.open_streamed(folder)


def test_weights_that_were_quantised_are_refused(tmp_path):
    """Without their scales they are other numbers."""
    folder = quantised_folder(tmp_path / "model")
    with pytest.raises(UnsupportedModel, match=r"are quantised \(fp8\), which are not read layer by layer"):
        hp.open_streamed(folder)


@pytest.mark.parametrize(
    ("work", "instead"),
    [
        (lambda model, folder: hp.prune(model, hp.PruningPlan.from_keep(model, {"model.layers.0.self_attn": [0]})), "prune_folder"),
        (lambda model, folder: hp.cut(model, {"model.layers.0.self_attn": [0]}, verify=False), "prune_folder"),
        (lambda model, folder: hp.save(model, folder), "copy that"),
        (lambda model, folder: export(model, "stock", folder), "export what"),
        (lambda model, folder: hp.recover(model, [labelled()], steps=1), "recover what"),
    ],
)
def test_what_takes_weights_in_memory_says_so(work, instead, tmp_path):
    model = hp.open_streamed(sharded_folder("llama", tmp_path / "model"))
    with pytest.raises(InvalidInput, match=rf"the weights of this LlamaForCausalLM are on disk .*{instead}"):
        work(model, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    with torch.no_grad():
        assert model(**labelled()).loss.isfinite()


def test_a_model_of_two_stacks_is_refused(tmp_path):
    config = transformers.T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=61)
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path / "model")
    with pytest.raises(UnsupportedModel, match="one stack"):
        hp.open_streamed(tmp_path / "model")


def test_layers_that_hand_on_a_position_bias_are_refused(tmp_path):
    config = transformers.T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=61)
    transformers.T5EncoderModel(config).save_pretrained(tmp_path / "model")
    batch = {"input_ids": labelled()["input_ids"]}
    with pytest.raises(UnsupportedModel, match="position bias"):
        hp.observe(hp.open_streamed(tmp_path / "model"), [batch], ["gram"])


@pytest.mark.parametrize("groups", [1, 2])
def test_layers_that_run_several_times_are_refused(groups, tmp_path):
    """Layer by layer their second pass would never be made."""
    sizes = {"embedding_size": 16, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "vocab_size": 61}
    config = transformers.AlbertConfig(**sizes, num_hidden_layers=4, num_hidden_groups=groups)
    transformers.AlbertModel(config).save_pretrained(tmp_path / "model")
    batch = {"input_ids": labelled()["input_ids"]}
    with pytest.raises(UnsupportedModel, match="call 2 of one pass is of layer 0, counted from 0; expected each"):
        hp.observe(hp.open_streamed(tmp_path / "model"), [batch], ["gram"])
    with torch.no_grad():
        whole = transformers.AlbertModel.from_pretrained(tmp_path / "model")
        assert torch.equal(hp.open_streamed(tmp_path / "model")(**batch)[0], whole(**batch)[0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_layers_run_there_and_score_as_in_its_memory(tmp_path):
    folder, batch = sharded_folder("llama", tmp_path / "model"), {name: value.cuda() for name, value in labelled().items()}
    before = allocated()
    model, whole = hp.open_streamed(folder, device="cuda"), hp.load(folder).cuda()
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, whole(**batch).logits)
    found, expected = (hp.score(one, [batch], "fisher", loss_fn=hp.causal_losses) for one in (model, whole))
    for name, heads in expected.items():
        torch.testing.assert_close(found[name], heads, rtol=1e-5, atol=0)
    # The whole model, and not the streamed one too.
    assert allocated() - before < 2 * sum(parameter.nbytes for parameter in whole.parameters())


def allocated() -> int:
    """Bytes of CUDA tensors, without the workspaces that each thread's matrix products keep."""
    torch._C._cuda_clearCublasWorkspaces()
    return torch.cuda.memory_allocated()


@pytest.mark.skipif("gemma4_shared" not in SHARING, reason="this transformers has no Gemma 4")
def test_layers_that_get_the_last_tokens_alone_are_refused(tmp_path):
    folder = sharded_folder("gemma4_shared", tmp_path / "model", **SHARED_LAYERS)
    batch = {"input_ids": labelled()["input_ids"], "logits_to_keep": 1}
    if not hasattr(hp.load(folder).model, "_maybe_slice_kv_shared_inputs"):
        pytest.skip("this transformers runs all tokens through all layers")
    with pytest.raises(UnsupportedModel, match="logits_to_keep"):
        hp.observe(hp.open_streamed(folder), [batch], ["gram"])


def test_keys_that_come_from_an_earlier_layer_in_an_unknown_way_are_refused():
    model = decoder("llama")
    trunk = trunk_of(model)
    reading = replace(trunk, sites=(trunk.sites[0], tuple(replace(site, own_keys=False) for site in trunk.sites[1])))
    with pytest.raises(UnsupportedModel, match="reads keys and values of an earlier layer"):
        enter(reading, lambda: model(**labelled()))
