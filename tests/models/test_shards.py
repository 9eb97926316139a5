"""Reading weight files."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from streamed_models import sharded_folder

import headprune as hp
from headprune.errors import CorruptCheckpoint, InvalidInput
from headprune.models.shards import INDEX, open_shards
from headprune.surgery.shard_writer import copy_range


@pytest.fixture
def folder(tmp_path):
    return sharded_folder("llama", tmp_path / "model")


def test_every_tensor_is_read_as_safetensors_reads_it(folder):
    shards = open_shards(folder)
    expected = {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
    assert len(shards.files) > 1
    assert set(shards) == set(expected)
    assert shards.nbytes == sum(tensor.nbytes for tensor in expected.values())
    for name, tensor in expected.items():
        assert torch.equal(shards.read(name), tensor)


def test_a_missing_file_is_named(folder):
    victim = sorted(folder.glob("*.safetensors"))[1]
    victim.unlink()
    with pytest.raises(CorruptCheckpoint, match=victim.name):
        open_shards(folder)


@pytest.mark.parametrize("left", [0, 4, 100, -1])
def test_a_file_cut_short_is_named(folder, left):
    victim = sorted(folder.glob("*.safetensors"))[1]
    victim.write_bytes(victim.read_bytes()[:left])
    with pytest.raises(CorruptCheckpoint, match=victim.name):
        open_shards(folder)


def test_a_broken_header_is_named(folder):
    victim = sorted(folder.glob("*.safetensors"))[0]
    content = bytearray(victim.read_bytes())
    content[8:12] = b"oops"
    victim.write_bytes(content)
    with pytest.raises(CorruptCheckpoint, match=victim.name):
        open_shards(folder)


def test_a_tensor_that_the_index_promises_in_vain_is_named(folder):
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["model.ghost.weight"] = next(iter(index["weight_map"].values()))
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(CorruptCheckpoint, match=r"model\.ghost\.weight"):
        open_shards(folder)


@pytest.mark.parametrize("names", [{}, {"model.norm.weight": 3}])
def test_an_index_that_names_no_files_is_no_index(names, folder):
    (folder / INDEX).write_text(json.dumps({"weight_map": names}))
    with pytest.raises(CorruptCheckpoint, match="no index of weights"):
        open_shards(folder)


def test_of_a_tensor_in_two_files_the_last_is_taken_as_transformers_does(folder):
    name, files = "model.layers.0.self_attn.q_proj.weight", sorted(folder.glob("*.safetensors"))
    assert open_shards(folder)[name].path == files[0]
    save_file({**load_file(files[-1]), name: torch.ones(32, 32)}, files[-1], {"format": "pt"})
    assert torch.equal(open_shards(folder).read(name), hp.load(folder).get_parameter(name))
    assert torch.equal(open_shards(folder).read(name), torch.ones(32, 32))


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(InvalidInput, match=r"neither model\.safetensors"):
        open_shards(tmp_path)


@pytest.mark.parametrize("take", [lambda shards, name: shards.read(name), lambda shards, name: copied(shards[name])])
def test_a_file_that_shrinks_under_way_is_named(folder, take):
    shards = open_shards(folder)
    name, stored = max(shards.items(), key=lambda item: item[1].nbytes)
    stored.path.write_bytes(stored.path.read_bytes()[: stored.start + stored.nbytes // 2])
    with pytest.raises(CorruptCheckpoint, match=rf"{stored.path.name} ended .*was it changed\?"):
        take(shards, name)


def copied(stored) -> None:
    with (stored.path.parent / "copy").open("wb", buffering=0) as target:
        copy_range(stored, target.fileno())
