"""What is said of a config.json whose values cannot be."""

import json

import pytest
from tiny_decoders import decoder
from tiny_encoders import VISION
from tiny_models import bert, llama

from headprune.errors import CorruptCheckpoint, InvalidInput, UnsupportedModel
from headprune.planning import PruningPlan
from headprune.surgery import cut, load, open_streamed, prune_folder, save
from headprune.surgery.checkpoint import skeleton

READERS = (skeleton, load, open_streamed)


def written(folder, **changes):
    """`folder` with these values in its config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


def refused(folder, kind, match):
    for read in READERS:
        with pytest.raises(kind, match=match):
            read(folder)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("num_attention_heads", 0, "num_attention_heads is 0; expected a whole number, 1 or more"),
        ("num_attention_heads", -4, "num_attention_heads is -4; expected a whole number, 1 or more"),
        ("num_hidden_layers", 0, "num_hidden_layers is 0; expected a whole number, 1 or more"),
        ("hidden_size", "big", "a value that transformers does not take: Field 'hidden_size' expected int, got str"),
        ("hidden_size", None, "a value that transformers does not take: Field 'hidden_size' expected int"),
        ("vocab_size", 1e4, "a value that transformers does not take: Field 'vocab_size' expected int, got float"),
        ("torch_dtype", "float9", r"torch_dtype is 'float9'; expected a floating-point torch\.dtype"),
        ("dtype", 7, r"dtype is 7; expected a floating-point torch\.dtype"),
        ("architectures", "BertModel", "architectures is 'BertModel'; expected a list of names"),
        ("id2label", 7, "a value that transformers does not take: 'int' object has no attribute 'items'"),
    ],
)
@pytest.mark.parametrize("make", [bert, llama])
def test_a_value_that_cannot_be_is_told_by_file_and_name(tmp_path, make, key, value, said):
    make().save_pretrained(tmp_path)
    refused(written(tmp_path, **{key: value}), InvalidInput, rf"{tmp_path}/config\.json.* {said}")


def test_sizes_by_a_familys_own_names_and_of_parts_are_told(tmp_path):
    decoder("gpt2").save_pretrained(tmp_path / "gpt2")
    refused(written(tmp_path / "gpt2", n_head=0), InvalidInput, "n_head is 0; expected")
    VISION["clip"].make().save_pretrained(tmp_path / "clip")
    text = json.loads((tmp_path / "clip" / "config.json").read_text())["text_config"]
    changed = written(tmp_path / "clip", text_config={**text, "num_attention_heads": -1})
    refused(changed, InvalidInput, r"text_config\.num_attention_heads is -1; expected")


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("num_attention_heads", 7, r"The hidden size \(32\) is not a multiple"),
        ("hidden_act", "geluu", "KeyError: 'geluu'"),
        ("pad_token_id", 1000, "AssertionError: Padding_idx must be within"),
    ],
)
def test_values_that_make_no_model_are_told_with_its_class(tmp_path, key, value, said):
    bert().save_pretrained(tmp_path)
    refused(written(tmp_path, **{key: value}), CorruptCheckpoint, f"{tmp_path} does not load as BertModel: {said}")


def test_classes_that_are_no_models_count_as_unknown(tmp_path):
    bert().save_pretrained(tmp_path)
    assert type(load(written(tmp_path, architectures=["BertConfig"]))).__name__ == "BertModel"


@pytest.mark.parametrize("text", ["7", "null", "[]", '"bert"'])
def test_a_file_without_an_object_is_told(tmp_path, text):
    bert().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(text)
    refused(tmp_path, InvalidInput, r"config\.json: it holds .*; expected a JSON object")


def test_a_section_that_is_none_of_ours_is_told_with_its_file(tmp_path):
    bert().save_pretrained(tmp_path)
    refused(written(tmp_path, headprune=7), CorruptCheckpoint, rf"{tmp_path}/config\.json: the headprune section of the config is")


def test_a_section_with_heads_that_the_model_has_not_is_told_with_its_folder(tmp_path):
    model = bert()
    cut(model, {"encoder.layer.0.attention": [1, 2]})
    save(model, tmp_path / "model")
    (tmp_path / "model" / "headprune.json").unlink()
    section = json.loads((tmp_path / "model" / "config.json").read_text())["headprune"]
    section["sites"]["encoder.layer.0.attention"]["kept"] = [1, 99]
    refused(written(tmp_path / "model", headprune=section), CorruptCheckpoint, f"{tmp_path}/model: .* query head 99 does not exist")


def test_a_type_with_its_own_code_is_told_and_nobody_is_asked_whether_to_run_it(tmp_path, monkeypatch):
    bert().save_pretrained(tmp_path)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    changed = written(tmp_path, model_type="mine", auto_map={"AutoConfig": "configuration_mine.MineConfig"})
    refused(changed, UnsupportedModel, r"config\.json: model_type 'mine' comes with its own code, which load does not run")


def test_adapters_are_told_where_they_would_be_left_out(tmp_path):
    """transformers attaches them to a model that is loaded whole."""
    (tmp_path / "adapters").mkdir()
    (tmp_path / "adapters" / "adapter_config.json").write_text("{}")
    refused(tmp_path / "adapters", InvalidInput, r"holds adapters without their model\. Attach them with peft")
    bert().save_pretrained(tmp_path / "both")
    (tmp_path / "both" / "adapter_config.json").write_text("{}")
    plan = PruningPlan.from_keep(bert(), {"encoder.layer.0.attention": [0]})
    for read in (open_streamed, lambda folder: prune_folder(folder, plan, tmp_path / "pruned")):
        with pytest.raises(UnsupportedModel, match=r"both holds adapters beside the model \(adapter_config\.json\)"):
            read(tmp_path / "both")


def test_settings_for_generation_that_cannot_be_read_are_told_by_the_reader_that_needs_them(tmp_path):
    llama().save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text("7")
    for read in (load, open_streamed):
        with pytest.raises(CorruptCheckpoint, match=f"{tmp_path} does not load as LlamaForCausalLM: 'int' object"):
            read(tmp_path)
