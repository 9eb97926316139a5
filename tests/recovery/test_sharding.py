"""Recovery of a model that is sharded over two ranks (FSDP2) gives what two ranks with whole models give."""

import json

import pytest
import torch
from child_process import by_two_ranks
from pruned_pairs import pruned_classifier, pruned_llama, text_batches
from safetensors.torch import load_file

import headprune as hp
from headprune.errors import InvalidInput
from headprune.recovery.sharding import refuse_scalars


@pytest.fixture(scope="module")
def folder(tmp_path_factory, worker_id):
    return by_two_ranks("sharded_ranks.py", tmp_path_factory, worker_id)


def said(folder, rank):
    return json.loads((folder / f"said{rank}.json").read_text())


def assert_alike(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        if not name.endswith(("key.bias", "k_proj.bias")):  # their gradients are 0, and Adam makes steps of what rounding leaves
            torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", ["taught", "accumulated", "adapters", "encoder", "plain torch", "projections", "no heads"])
def test_sharded_ranks_train_as_whole_ones(folder, case):
    expected = load_file(folder / f"{case}-whole0.safetensors")
    for rank in (0, 1):
        assert_alike(load_file(folder / f"{case}-sharded{rank}.safetensors"), expected)
        for what in ("losses", "evaluations"):
            found, other = (said(folder, rank)[f"{case}-{way}"][what] for way in ("sharded", "whole"))
            torch.testing.assert_close(torch.tensor(found), torch.tensor(other), rtol=1e-4, atol=1e-5)


def test_a_sharded_recovery_that_was_stopped_goes_on(folder):
    expected = load_file(folder / "taught-whole0.safetensors")
    for rank in (0, 1):
        assert {"checkpoint-2", "best-0-of-2.safetensors", "best-1-of-2.safetensors"} <= set(said(folder, rank)["stopped"])
        assert_alike(load_file(folder / f"resumed{rank}.safetensors"), expected)
        steps = [step for step, _ in said(folder, rank)["resumed"]["losses"]]
        assert steps == [1, 2, 3, 4, 5, 6]
        assert said(folder, rank)["left"] == ["recovered.safetensors", "recovery.json", "settings.json"]


def test_ranks_begin_from_the_first_ones_weights_and_end_with_their_own_parameters(folder):
    assert said(folder, 0)["differing"] == [1.0, 1.0, 1.0]
    assert said(folder, 1)["differing"] == [2.0, 1.0, 1.0]


def test_a_model_that_cannot_be_sharded_stays_as_it_was(folder):
    assert [said(folder, rank)["half sharded"] for rank in (0, 1)] == [[True, True]] * 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fsdp": True}, "shards over several ranks, and there is one"),
        ({"fsdp": "shard_grad_op"}, "fsdp='shard_grad_op'; expected True"),
        ({"fsdp": True, "fsdp_config": {"cpu_offload": True}}, "fsdp_config is not taken"),
        ({"fsdp": True, "deepspeed": {"zero_optimization": {"stage": 2}}}, "give one of them"),
    ],
)
def test_what_cannot_be_sharded_is_refused_before_anything_is_written(tmp_path, options, message):
    _, model = pruned_llama()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(InvalidInput, match=message):
        hp.recover(model, text_batches(), steps=1, output_dir=tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_accelerates_own_sharding_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    _, model = pruned_llama()
    with pytest.raises(InvalidInput, match="launch with torchrun"):
        hp.recover(model, text_batches(), steps=1)


def test_a_parameter_of_one_number_is_named():
    _, model, _, _ = pruned_classifier()
    model.scale = torch.nn.Parameter(torch.tensor(1.0))
    with pytest.raises(InvalidInput, match="cannot shard scale, a single number"):
        refuse_scalars(model)
