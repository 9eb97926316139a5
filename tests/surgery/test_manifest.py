"""What `load` says of a folder that is not what `save` wrote."""

import json

import pytest
import torch
from tiny_models import bert, hidden, padded

from headprune.errors import CorruptCheckpoint
from headprune.surgery import cut, load, save


@pytest.fixture
def folder(tmp_path):
    model = bert()
    cut(model, {"encoder.layer.0.attention": [1, 2]})
    return save(model, tmp_path / "model", max_shard_size="20KB")


def shards(folder) -> list:
    return sorted(folder.glob("*.safetensors"))


def refused(folder) -> str:
    with pytest.raises(CorruptCheckpoint) as refusal:
        load(folder)
    return str(refusal.value)


def test_one_flipped_bit_is_found_and_its_file_named(folder):
    shard = shards(folder)[1]
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    shard.write_bytes(content)
    assert f"{shard} is corrupt" in refused(folder)
    assert hidden(load(folder, verify=False), **padded()).isfinite().all()


def test_a_truncated_and_a_missing_shard_are_named(folder):
    first, second = shards(folder)[:2]
    first.write_bytes(first.read_bytes()[:-7])
    assert f"{first} has" in refused(folder)
    first.unlink()
    assert f"{first} is missing" in refused(folder)
    assert second.exists()


def test_an_edited_head_count_is_found(folder):
    config = json.loads((folder / "config.json").read_text())
    config["per_layer_config"]["0"]["num_attention_heads"] = 3
    (folder / "config.json").write_text(json.dumps(config))
    assert "per_layer_config" in refused(folder)


def test_other_edits_of_the_config_are_the_users_to_make(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_dropout_prob": 0.3, "note": "mine"}))
    assert load(folder).config.hidden_dropout_prob == 0.3


def test_an_edited_size_is_refused_with_the_tensor_that_does_not_fit(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 40}))
    assert "intermediate" in refused(folder)


def test_a_manifest_of_a_newer_headprune_is_refused(folder):
    document = json.loads((folder / "headprune.json").read_text())
    (folder / "headprune.json").write_text(json.dumps(document | {"schema_version": 99}))
    assert "schema version 99" in refused(folder)


def test_a_folder_without_a_manifest_loads(folder):
    expected = hidden(load(folder), **padded())
    (folder / "headprune.json").unlink()
    assert torch.equal(hidden(load(folder), **padded()), expected)
