"""What `load` says of a folder that is not what `save` wrote."""

import json

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import bert, hidden, padded

from headprune.errors import CorruptCheckpoint
from headprune.planning import PruningPlan
from headprune.surgery import cut, load, prune_folder, save


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


def test_a_weight_file_in_a_folder_inside_is_checked_too(tmp_path):
    """Of an embedder with a dense layer, whether it is saved or pruned in its files."""
    source = tmp_path / "source"
    bert().save_pretrained(source)
    (source / "2_Dense").mkdir()
    (source / "2_Dense" / "config.json").write_text("{}")
    save_file({"linear.weight": torch.ones(2, 2)}, source / "2_Dense" / "model.safetensors")
    model = load(source)
    plan = PruningPlan.from_keep(model, {"encoder.layer.0.attention": [1, 2]})
    prune_folder(source, plan, tmp_path / "pruned")
    for target in (save(model, tmp_path / "saved"), tmp_path / "pruned"):
        load(target)
        (target / "2_Dense" / "model.safetensors").write_bytes(b"")
        assert f"{target}/2_Dense/model.safetensors has 0 bytes" in refused(target)


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


@pytest.mark.parametrize("weights", [7, [], {"model.safetensors": 7}, {"model.safetensors": {"bytes": "many"}}])
def test_a_damaged_manifest_is_named(folder, weights):
    document = json.loads((folder / "headprune.json").read_text())
    (folder / "headprune.json").write_text(json.dumps(document | {"weights": weights}))
    assert f"{folder}/headprune.json is damaged" in refused(folder)


def test_a_folder_without_a_manifest_loads(folder):
    expected = hidden(load(folder), **padded())
    (folder / "headprune.json").unlink()
    assert torch.equal(hidden(load(folder), **padded()), expected)
