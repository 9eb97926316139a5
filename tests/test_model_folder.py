"""What a model may take the place of: one of headprune's, and only on request another; other files stay."""

import json
import os
from pathlib import Path

import pytest
import torch
from tiny_models import bert, llama

import headprune as hp
from headprune.errors import HeadpruneError, InvalidInput
from headprune.files import whole_folder
from headprune.model_folder import PARTS, refuse_replacing
from headprune.surgery import cut, save
from headprune.surgery.export import export

KEEP = {"model.layers.0.self_attn": [0, 1]}


def written_by_save(source, target, **options):
    hp.save(llama(), target, **options)


def written_of_a_plain_module(source, target, **options):
    hp.save(torch.nn.TransformerEncoderLayer(8, 2), target, **options)


def written_by_prune_folder(source, target, **options):
    hp.prune_folder(source, hp.PruningPlan.from_keep(llama(), KEEP), target, **options)


def written_by_export(source, target, **options):
    export(llama(), "stock", target, **options)


def written_for_vllm(source, target, **options):
    export(llama(), "vllm", target, **options)


WRITERS = [written_by_save, written_of_a_plain_module, written_by_prune_folder, written_by_export, written_for_vllm]
each_writer = pytest.mark.parametrize("write", WRITERS)


@pytest.fixture
def source(tmp_path):
    """A folder that headprune wrote, to be pruned."""
    return save(llama(), tmp_path / "source")


@pytest.fixture
def theirs(tmp_path):
    """A folder that transformers wrote, with a file of somebody's beside the model, and one in a folder."""
    folder = tmp_path / "theirs"
    bert().save_pretrained(folder)
    (folder / "notes.txt").write_text("mine")
    (folder / "runs").mkdir()
    (folder / "runs" / "events").write_text("mine too")
    return folder


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@each_writer
def test_a_model_of_somebody_else_s_stays_unless_it_is_to_go(write, source, theirs):
    before = contents(theirs)
    with pytest.raises(InvalidInput, match="theirs holds a model that headprune did not write") as told:
        write(source, theirs)
    assert all(part in str(told.value) for part in ("config.json, model.safetensors", "another folder", "--overwrite"))
    assert contents(theirs) == before
    write(source, theirs, overwrite=True)
    assert (theirs / "model.safetensors").read_bytes() != before[Path("model.safetensors")]
    assert (theirs / "headprune.json").is_file()
    assert (theirs / "notes.txt").read_text() == "mine"
    assert (theirs / "runs" / "events").read_text() == "mine too"


@each_writer
def test_headprune_s_own_model_is_replaced_and_other_files_stay(write, source, tmp_path):
    target = tmp_path / "target"
    write(source, target)
    first = contents(target)
    (target / "notes.txt").write_text("mine")
    (target / "model-00001-of-00002.safetensors").write_bytes(b"of an earlier model in two files")
    write(source, target)
    assert {str(path) for path in contents(target)} == {str(path) for path in first} | {"notes.txt"}
    assert (target / "notes.txt").read_text() == "mine"


def test_what_a_trainer_saved_of_a_pruned_model_is_headprune_s(tmp_path):
    model = llama()
    cut(model, KEEP)
    model.save_pretrained(tmp_path / "checkpoint")
    assert refuse_replacing(tmp_path / "checkpoint") == tmp_path / "checkpoint"


@pytest.mark.parametrize("config", ["", "[]", "3", "{}"])
def test_a_config_that_says_nothing_is_somebody_else_s(tmp_path, config):
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(InvalidInput, match="did not write"):
        refuse_replacing(tmp_path)
    assert refuse_replacing(tmp_path, overwrite=True) == tmp_path


def test_transformers_own_saving_and_trainers_checkpoints_replace_as_ever(theirs):
    model = llama()
    cut(model, KEEP)
    model.save_pretrained(theirs)
    assert json.loads((theirs / "config.json").read_text())["model_type"] == "llama"


def test_an_export_for_another_engine_is_not_loaded_and_its_name_is_told(tmp_path):
    pytest.importorskip("gguf")
    export(llama(), "gguf", tmp_path / "out")
    export(llama(), "gguf", tmp_path / "out")
    with pytest.raises(InvalidInput, match="out is for gguf, which load does not read"):
        hp.load(tmp_path / "out")


def test_a_link_is_replaced_and_where_it_led_to_all_stays(tmp_path):
    folder = save(bert(), tmp_path / "first")
    (folder / "notes.txt").write_text("mine")
    before = contents(folder)
    (tmp_path / "link").symlink_to(folder)
    save(llama(), tmp_path / "link")
    assert contents(folder) == before
    assert not (tmp_path / "link").is_symlink()


def test_a_file_that_cannot_be_moved_back_is_named_with_its_place(tmp_path, monkeypatch):
    target = tmp_path / "model"
    target.mkdir()
    (target / "notes.txt").write_text("mine")
    own = os.replace

    def refused(source, destination):
        if str(destination).endswith("notes.txt"):
            raise PermissionError(13, "Permission denied")
        own(source, destination)

    monkeypatch.setattr("headprune.files.os.replace", refused)
    with (
        pytest.raises(
            HeadpruneError, match=r"notes.txt, which was there before, could not be moved back: Permission denied"
        ) as told,
        whole_folder(target, PARTS) as draft,
    ):
        (draft / "config.json").write_text("{}")
    (left,) = tmp_path.glob(".headprune-old-*/model/notes.txt")
    assert str(left.parent) in str(told.value)
    assert left.read_text() == "mine"


def test_a_model_takes_the_place_of_a_model_and_of_nothing_else(tmp_path, monkeypatch):
    folder = save(bert(), tmp_path / "models" / "one")
    assert refuse_replacing(folder) == folder
    (tmp_path / "empty").mkdir()
    assert refuse_replacing(tmp_path / "empty") == tmp_path / "empty"
    with pytest.raises(InvalidInput, match="holds no model"):
        save(bert(), tmp_path / "models")
    (tmp_path / "letter.txt").write_text("")
    with pytest.raises(InvalidInput, match="is a file; give a folder"):
        save(bert(), tmp_path / "letter.txt")
    (folder / ".git").mkdir()
    with pytest.raises(InvalidInput, match="git repository"):
        save(bert(), folder)
    (folder / ".git").rmdir()
    monkeypatch.chdir(folder)
    with pytest.raises(InvalidInput, match="the folder that this runs in"):
        save(bert(), ".")
    with pytest.raises(InvalidInput, match="the folder that this runs in"):
        save(bert(), "..")
    assert (folder / "config.json").exists()
