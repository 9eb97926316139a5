"""Reading weight files."""

import json

import pytest
import torch
from safetensors.torch import load_file
from streamed_models import sharded_folder

from headprune.errors import CorruptCheckpoint, InvalidInput
from headprune.models.shards import INDEX, open_shards


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


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(InvalidInput, match=r"neither model\.safetensors"):
        open_shards(tmp_path)
