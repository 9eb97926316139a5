"""`AutoModel*.from_pretrained(folder, trust_remote_code=True)`, with headprune and where it cannot be imported."""

import copy
import inspect
import json
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import transformers
from tiny_decoders import decoder
from tiny_encoders import SEQ2SEQ
from tiny_models import bert, hidden, llama, padded
from transformers import (
    AttentionInterface,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    PreTrainedConfig,
    Trainer,
    TrainingArguments,
)

from headprune.errors import InvalidInput
from headprune.head_map import HeadMap
from headprune.models import attention_sites
from headprune.surgery import cut, load, modeling_headprune, save
from headprune.surgery.export import regularise

EVEN = {"model.layers.0.self_attn": [0, 1, 6, 7], "model.layers.1.self_attn": [2]}
RAGGED = {"model.layers.0.self_attn": [0, 1, 3, 6], "model.layers.1.self_attn": [2, 4, 5]}
MODELS = {
    "llama_even": (llama, EVEN, "AutoModelForCausalLM"),
    "llama_ragged": (llama, RAGGED, "AutoModelForCausalLM"),
    "llama_saved_by_transformers": (llama, RAGGED | {"model.layers.0.self_attn": []}, "AutoModelForCausalLM"),
    "llama_base": (llama, RAGGED, "AutoModel"),
    "bert": (bert, {"encoder.layer.0.attention": [1], "encoder.layer.1.attention": [0, 2, 3]}, "AutoModel"),
}
WITHOUT_HEADPRUNE = """
import sys
sys.modules["headprune"] = None  # any import of it now fails
import torch, transformers
from tiny_models import hidden, padded
for name in sys.argv[2:]:
    kind, folder = name.split("=")
    auto = getattr(transformers, kind)
    model = auto.from_pretrained(folder, trust_remote_code=True, local_files_only=True)
    assert not any(module.startswith("headprune.") for module in sys.modules)
    found = [hidden(model, **padded())]
    if model.can_generate():
        options = {"max_new_tokens": 8, "do_sample": False, "cache_implementation": "static", "disable_compile": True}
        found.append(model.generate(**padded(), **options))
        eager = auto.from_pretrained(folder, trust_remote_code=True, local_files_only=True, attn_implementation="eager")
        found.append(hidden(eager, **padded()))
    model.save_pretrained(folder + "-again")
    again = auto.from_pretrained(folder + "-again", trust_remote_code=True, local_files_only=True)
    found.append(hidden(again, **padded()))
    torch.save(found, folder + "/found.pt")
"""


def pruned(name: str):
    make, keep, _ = MODELS[name]
    model = make()
    cut(model, keep)
    return model


def by_disk(model):
    with tempfile.TemporaryDirectory() as folder:
        return load(save(model, folder))


def by_auto_model(model):
    with tempfile.TemporaryDirectory() as folder:
        return AutoModelForCausalLM.from_pretrained(save(model, folder), trust_remote_code=True)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("remote")
    for name in MODELS:
        pruned(name).save_pretrained(root / name) if name == "llama_saved_by_transformers" else save(pruned(name), root / name)
    arguments = [f"{auto}={root / name}" for name, (_, _, auto) in MODELS.items()]
    command = [sys.executable, "-c", WITHOUT_HEADPRUNE, "", *arguments]
    paths = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths})
    assert done.returncode == 0, done.stderr
    return root


def reference(name: str):
    model = pruned(name)
    return model.base_model if MODELS[name][2] == "AutoModel" and name != "bert" else model


@pytest.mark.parametrize("name", MODELS)
def test_a_folder_loads_where_headprune_is_not(folders, name):
    model = reference(name)
    expected = hidden(model, **padded())
    found = torch.load(folders / name / "found.pt")
    tokens = [] if len(found) == 2 else [found.pop(1)]
    assert all(torch.allclose(output, expected, atol=2e-6) for output in found)
    for sequence in tokens:
        assert torch.equal(sequence, model.generate(**padded(), max_new_tokens=8, do_sample=False))


@pytest.mark.parametrize("name", MODELS)
def test_with_headprune_the_same_folder_runs_its_kernels_and_can_be_pruned_further(folders, name):
    auto = {"AutoModel": AutoModel, "AutoModelForCausalLM": AutoModelForCausalLM}[MODELS[name][2]]
    model = auto.from_pretrained(folders / name, trust_remote_code=True)
    expected = reference(name)
    assert torch.allclose(hidden(model, **padded()), hidden(expected, **padded()), atol=2e-6)
    maps = [site.head_map for site in attention_sites(model)]
    assert maps == [site.head_map for site in attention_sites(expected)]
    assert (model.config._attn_implementation == "headprune") == (not all(head_map.is_uniform for head_map in maps))
    keep = {attention_sites(model)[1].name: [0]}
    cut(model, keep)
    cut(expected, keep)
    assert torch.allclose(hidden(model, **padded()), hidden(expected, **padded()), atol=2e-6)


def test_what_only_headprune_can_build_says_so_elsewhere(tmp_path, monkeypatch):
    model = pruned("llama_even")
    model.model.layers[0].mlp.act_fn = torch.nn.Tanh()  # not what the stock class has there
    folder = save(model, tmp_path / "there")
    monkeypatch.setattr(modeling_headprune, "headprune", None)
    with pytest.raises(ImportError, match="pip install headprune"):
        modeling_headprune.HeadPrunedLlamaForCausalLM.from_pretrained(folder)


def test_arguments_can_be_checked_against_the_constructor_s_annotations_as_vllm_does(folders):
    model = AutoModel.from_pretrained(folders / "llama_ragged", trust_remote_code=True)
    annotations = [parameter.annotation for parameter in inspect.signature(type(model).__init__).parameters.values()]
    assert all(annotation is inspect.Parameter.empty or isinstance(annotation, type) for annotation in annotations)


def test_what_transformers_saved_again_loads_with_headprune(folders):
    again = load(folders / "llama_ragged-again")
    assert torch.equal(hidden(again, **padded()), hidden(load(folders / "llama_ragged"), **padded()))


@pytest.mark.parametrize("come", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), by_disk, by_auto_model])
def test_save_pretrained_writes_what_auto_model_needs(come, tmp_path):
    model = come(pruned("llama_ragged"))
    cut(model, {"model.layers.1.self_attn": [0]})
    assert type(model).__name__ == "LlamaForCausalLM"
    save(model, tmp_path / "there")  # its digests are those of what stood there before
    model.lm_head.weight.data.mul_(2)
    model.save_pretrained(tmp_path / "there")
    expected = hidden(model, **padded())
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "there", trust_remote_code=True)
    assert torch.equal(hidden(found, **padded()), expected)
    assert torch.equal(hidden(load(tmp_path / "there"), **padded()), expected)


@pytest.mark.parametrize(("asked", "taken"), [(None, "headprune"), ("sdpa", "sdpa"), ("eager", "eager")])
def test_auto_model_takes_the_attention_that_is_asked_for(folders, asked, taken):
    options = {} if asked is None else {"attn_implementation": asked}
    model = AutoModelForCausalLM.from_pretrained(folders / "llama_ragged", trust_remote_code=True, **options)
    assert model.config._attn_implementation == taken
    assert torch.allclose(hidden(model, **padded()), hidden(load(folders / "llama_ragged"), **padded()), atol=1e-5)


def test_a_trainer_that_smooths_labels_shifts_those_of_a_pruned_language_model(folders, tmp_path):
    pytest.importorskip("accelerate")
    model = AutoModelForCausalLM.from_pretrained(folders / "llama_ragged", trust_remote_code=True)
    arguments = TrainingArguments(tmp_path / "trainer", label_smoothing_factor=0.1, use_cpu=True, report_to=[])
    ids = padded()["input_ids"]
    found = Trainer(model, arguments).compute_loss(model, {"input_ids": ids, "labels": ids})
    expected = torch.nn.functional.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), label_smoothing=0.1)
    assert torch.allclose(found, expected)


def test_adapters_are_saved_without_the_model_s_code(tmp_path):
    peft = pytest.importorskip("peft")
    model = pruned("llama_ragged")
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} & {"config.json", "modeling_headprune.py"} == set()
    with pytest.raises(InvalidInput, match=r"push_to_hub\(\)"):
        model.save_pretrained(tmp_path, push_to_hub=True)


def test_a_pruned_encoder_becomes_a_classifier(folders):
    model = AutoModelForSequenceClassification.from_pretrained(folders / "bert", trust_remote_code=True, num_labels=3)
    assert [str(site.head_map) for site in attention_sites(model)] == ["1q/1kv", "3q/3kv"]
    assert torch.equal(hidden(model.bert, **padded()), hidden(pruned("bert"), **padded()))
    assert model(**padded()).logits.shape == (3, 3)


def test_of_several_classes_for_a_task_the_one_that_was_saved_is_loaded(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = DeiTForImageClassificationWithTeacher(DeiTConfig(**sizes, image_size=8, patch_size=4, num_labels=3)).eval()
    cut(model, {"deit.layers.0.attention": [1]})
    save(model, tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path, trust_remote_code=True)
    pixels = torch.randn(2, 3, 8, 8)
    assert torch.equal(loaded(pixel_values=pixels).logits, model(pixel_values=pixels).logits)


@pytest.mark.parametrize(("name", "auto"), [("t5", "AutoModelForTextEncoding"), ("whisper", "AutoModelForAudioClassification")])
def test_a_class_of_the_encoder_alone_takes_the_encoder_of_a_pruned_encoder_decoder(name, auto, tmp_path):
    model, batch = SEQ2SEQ[name].make(), SEQ2SEQ[name].batch("right")
    cut(model, {site.name: [0, 2, 3] for site in attention_sites(model)})
    save(model, tmp_path)
    half = getattr(transformers, auto).from_pretrained(tmp_path, trust_remote_code=True)
    assert {str(site.head_map) for site in attention_sites(half)} == {"3q/3kv"}
    inputs = {key: value for key, value in batch.items() if key in ("input_ids", "attention_mask", "input_features")}
    torch.testing.assert_close(half.get_encoder()(**inputs)[0], model.get_encoder()(**inputs)[0])


def test_a_module_that_is_missing_is_named(folders, tmp_path):
    shutil.copytree(folders / "bert", tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    config["headprune"]["sites"]["encoder.layer.7.attention"] = config["headprune"]["sites"]["encoder.layer.0.attention"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    for auto in (AutoModel, AutoModelForSequenceClassification):
        with pytest.raises(ValueError, match=r"has no module encoder\.layer\.7"):
            auto.from_pretrained(tmp_path, trust_remote_code=True)


def test_the_stock_class_refuses_the_folder_instead_of_filling_it_with_noise(folders):
    with pytest.raises(RuntimeError, match=r"(?i)mismatch"):
        AutoModelForCausalLM.from_pretrained(folders / "llama_even", trust_remote_code=False)


def test_an_engine_with_its_own_attention_is_refused_ragged_groups(folders, monkeypatch):
    monkeypatch.setitem(AttentionInterface._global_mapping, "engine", lambda *arguments, **options: None)
    with pytest.raises(ValueError, match="headprune export"):
        AutoModel.from_pretrained(folders / "llama_ragged", trust_remote_code=True, attn_implementation="engine")
    assert AutoModel.from_pretrained(folders / "llama_even", trust_remote_code=True, attn_implementation="engine") is not None


def test_the_counts_are_said_in_transformers_own_way_too(folders):
    def config(name: str) -> dict:
        return json.loads((folders / name / "config.json").read_text())

    assert config("llama_even")["per_layer_config"] == {
        "0": {"num_attention_heads": 4, "num_key_value_heads": 2}, "1": {"num_attention_heads": 1, "num_key_value_heads": 1}
    }  # fmt: skip
    assert config("bert")["per_layer_config"] == {"0": {"num_attention_heads": 1}, "1": {"num_attention_heads": 3}}
    assert config("bert")["head_dim"] == 8
    ragged = config("llama_saved_by_transformers")["per_layer_config"]
    assert ragged["0"] == {"num_attention_heads": 1, "num_key_value_heads": 1, "skip": ["attention"]}  # a placeholder in caches
    assert ragged["1"] == {"num_attention_heads": 3, "num_key_value_heads": 2}


def test_a_further_cut_renews_the_counts(folders):
    model = load(folders / "llama_even")
    cut(model, {"model.layers.0.self_attn": [0]})
    assert [layer.num_attention_heads for layer in model.config.per_layer_config] == [1, 1]
    cut(ragged := llama(), {"model.layers.0.self_attn": [0, 1, 2, 3, 4]})
    assert [layer.num_key_value_heads for layer in ragged.config.per_layer_config] == [3, 4]
    assert attention_sites(ragged)[0].head_map == HeadMap((0, 0, 1, 1, 2), 3)


def test_a_regularised_model_that_then_loses_an_attention_survives_the_disk(tmp_path):
    model = pruned("llama_ragged")
    regularise(model)
    cut(model, {attention_sites(model)[0].name: []})
    expected = hidden(model, **padded())
    assert torch.allclose(hidden(load(save(model, tmp_path / "there")), **padded()), expected, atol=2e-6)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "there", trust_remote_code=True)
    assert torch.allclose(hidden(found, **padded()), expected, atol=2e-6)
    assert regularise(found).layers
    assert torch.allclose(hidden(found, **padded()), expected, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "bloom", "falcon_gqa", "mpt", "dbrx"])  # whose configs have own names for the counts
def test_a_trainer_reads_the_config_of_its_checkpoint_as_one_of_no_family(family, tmp_path, monkeypatch):
    model = decoder(family)
    cut(model, {attention_sites(model)[0].name: [0]})
    PreTrainedConfig.from_json_file(save(model, tmp_path / "there") / "config.json")
    monkeypatch.setattr(modeling_headprune, "headprune", None)
    elsewhere = getattr(modeling_headprune, f"HeadPruned{type(model).__name__}").from_pretrained(tmp_path / "there")
    elsewhere.save_pretrained(tmp_path / "again")
    assert PreTrainedConfig.from_json_file(tmp_path / "again" / "config.json").num_hidden_layers == 2
