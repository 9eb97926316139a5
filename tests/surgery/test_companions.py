"""Tokenizer, processor and generation files travel with a pruned model."""

import pytest
import torch
from tiny_encoders import VISION
from tiny_models import llama
from tokenizers import Tokenizer, models
from transformers import AutoImageProcessor, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast, ViTImageProcessor

from headprune.errors import InvalidInput
from headprune.surgery import cut, load, open_streamed, save
from headprune.surgery.companions import copy_companions
from headprune.surgery.export import export


def tokenizer(word: str = "head") -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"[UNK]": 0, word: 1}, unk_token="[UNK]")))


@pytest.fixture
def dense(tmp_path):
    model = llama()
    model.generation_config.update(max_new_tokens=7)
    folder = save(model, tmp_path / "dense", tokenizer=tokenizer())
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    (folder / "optimizer.pt").write_bytes(b"state")
    (folder / "README.md").write_text("the dense model")
    for name in ("LICENSE.txt", "NOTICE", "USE_POLICY.md", "spm.model", "qwen.tiktoken"):
        (folder / name).write_text(name)
    return folder


def test_files_of_the_folder_that_a_model_came_from_go_along(tmp_path, dense):
    model = load(dense)
    cut(model, {"model.layers.0.self_attn": [1]})
    folder = save(model, tmp_path / "pruned")
    assert AutoTokenizer.from_pretrained(folder)("head").input_ids == [1]
    assert (folder / "chat_template.jinja").read_text() == "{{ messages }}"
    assert (folder / "1_Pooling" / "config.json").exists()
    assert not (folder / "optimizer.pt").exists()
    assert not (folder / "README.md").exists()
    assert all((folder / name).exists() for name in ("LICENSE.txt", "NOTICE", "USE_POLICY.md", "spm.model", "qwen.tiktoken"))
    assert load(folder).generation_config.max_new_tokens == 7


@pytest.mark.parametrize(
    "write", [save, lambda model, folder, **given: export(model, "stock", folder, **given)], ids=["save", "export"]
)
def test_a_source_or_tokenizer_that_is_none_is_refused_before_anything_is_written(write, tmp_path):
    with pytest.raises(InvalidInput, match=r"source is '.*nowhere'; expected a folder"):
        write(llama(), tmp_path / "out", source=tmp_path / "nowhere")
    with pytest.raises(InvalidInput, match="tokenizer or processor is 'gpt2'; expected the object"):
        write(llama(), tmp_path / "out", tokenizer="gpt2")
    assert list(tmp_path.iterdir()) == []


def test_they_are_found_from_another_folder_too(tmp_path, dense, monkeypatch):
    monkeypatch.chdir(dense.parent)
    model = load(dense.name)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert AutoTokenizer.from_pretrained(save(model, "pruned")).get_vocab() == tokenizer().get_vocab()
    assert str(tmp_path) not in (tmp_path / "elsewhere" / "pruned" / "config.json").read_text()


def test_exports_keep_how_the_model_generates(tmp_path, dense):
    model = load(dense)
    cut(model, {"model.layers.0.self_attn": [1]})
    export(model, "stock", tmp_path / "out")
    assert GenerationConfig.from_pretrained(tmp_path / "out").max_new_tokens == 7
    assert open_streamed(dense).generation_config.max_new_tokens == 7


def test_a_given_tokenizer_takes_precedence_and_a_source_can_be_named(tmp_path, dense):
    folder = save(load(dense), tmp_path / "given", tokenizer=tokenizer("gate"))
    assert AutoTokenizer.from_pretrained(folder)("gate").input_ids == [1]
    folder = save(llama(), tmp_path / "named", source=dense)
    assert AutoTokenizer.from_pretrained(folder)("head").input_ids == [1]


def test_a_processor_goes_along_given_or_found(tmp_path):
    model = VISION["vit"].make()
    cut(model, {"vit.layers.0.attention": [1, 2]})
    folder = save(model, tmp_path / "given", processor=ViTImageProcessor(size={"height": 16, "width": 16}))
    model = load(folder)
    again = save(model, tmp_path / "found")
    assert AutoImageProcessor.from_pretrained(again).size["height"] == 16


def test_a_folder_saved_over_itself_keeps_its_files(dense):
    before = load(dense)
    cut(before, {"model.layers.0.self_attn": [1]})
    save(before, dense)
    assert AutoTokenizer.from_pretrained(dense)("head").input_ids == [1]
    assert torch.equal(load(dense).lm_head.weight, before.lm_head.weight)


def test_a_copy_that_breaks_off_leaves_no_half_of_a_file(tmp_path, dense, monkeypatch):
    def half(source, target):
        with open(target, "w", encoding="utf-8") as file:
            file.write("{")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("headprune.surgery.companions.shutil.copyfile", half)
        with pytest.raises(KeyboardInterrupt):
            copy_companions(dense, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    assert "tokenizer.json" in copy_companions(dense, tmp_path / "new")
