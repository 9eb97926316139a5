"""Compensation layer by layer from disk gives what compensation in memory gives."""

import signal
import subprocess
import sys

import pytest
import torch
from child_process import environment
from streamed_models import SHARED_LAYERS, SHARING, batches_of_tokens, sharded_folder
from tiny_decoders import FAMILIES

import headprune as hp
from headprune.errors import HeadpruneError, InvalidInput
from headprune.surgery import prune_folder as _  # noqa: F401 (the module, below, goes by its function's name)

KEPT = [1, 2]


def plan_for(folder):
    model = hp.load(folder)
    return hp.PruningPlan.from_keep(model, {site.name: KEPT for site in hp.attention_sites(model)})


def assert_same_weights(found, expected):
    assert list(found.state_dict()) == list(expected.state_dict())
    assert all(torch.equal(tensor, expected.state_dict()[name]) for name, tensor in found.state_dict().items())


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "stablelm"])
def test_bit_for_bit(family, tmp_path):
    folder, batches = sharded_folder(family, tmp_path / "model"), batches_of_tokens()
    plan, model = plan_for(folder), hp.load(folder)
    expected = hp.prune(model, plan, batches)
    found = hp.prune_folder(folder, plan, tmp_path / "pruned", batches)
    assert list(found) == list(expected)
    assert any(one.ridge is not None for one in found)
    assert_same_weights(hp.load(tmp_path / "pruned"), model)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("method", ["mask_tuning", "bias"])
def test_the_other_methods_too(method, tmp_path):
    folder, batches = sharded_folder("llama", tmp_path / "model"), batches_of_tokens()
    plan, model = plan_for(folder), hp.load(folder)
    hp.prune(model, plan, batches, compensation=method)
    hp.prune_folder(folder, plan, tmp_path / "pruned", batches, compensation=method)
    assert_same_weights(hp.load(tmp_path / "pruned"), model)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe"])
def test_ends_of_feed_forwards_too(family, tmp_path):
    folder, batches = sharded_folder(family, tmp_path / "model"), batches_of_tokens() * 3
    plan, model = plan_for(folder), hp.load(folder)
    expected = hp.prune(model, plan, batches, feed_forward=True)
    found = hp.prune_folder(folder, plan, tmp_path / "pruned", batches, feed_forward=True)
    assert list(found) == list(expected)
    assert_same_weights(hp.load(tmp_path / "pruned"), model)


def test_layers_that_keep_their_heads_are_walked_through(tmp_path):
    folder, batches = sharded_folder("llama", tmp_path / "model", num_hidden_layers=4), batches_of_tokens()
    model = hp.load(folder)
    plan = hp.PruningPlan.from_keep(model, {"model.layers.1.self_attn": [0], "model.layers.3.self_attn": [2, 3]})
    hp.prune(model, plan, batches)
    hp.prune_folder(folder, plan, tmp_path / "pruned", batches)
    assert_same_weights(hp.load(tmp_path / "pruned"), model)


@pytest.mark.parametrize("first", [0, 2, 4], ids=["from the first layer", "from one that gives keys", "from one that reads them"])
@pytest.mark.parametrize("family", SHARING)
def test_keys_that_later_layers_read_are_those_of_either_model(family, first, tmp_path, monkeypatch):
    folder, batches = sharded_folder(family, tmp_path / "model", **SHARED_LAYERS), batches_of_tokens()
    model, kind = hp.load(folder), sys.modules["headprune.surgery.streamed_compensation"].StreamedCompensation
    plan = hp.PruningPlan.from_keep(model, {site.name: KEPT for site in hp.attention_sites(model)[first:]})
    expected = hp.prune(model, plan, batches)
    with monkeypatch.context() as patch:  # stopped behind the layers that give keys, and before those that read them
        own = kind._layer
        patch.setattr(kind, "_layer", lambda self, layer, **rest: stopped() if layer == 5 else own(self, layer, **rest))
        with pytest.raises(KeyboardInterrupt):
            hp.prune_folder(folder, plan, tmp_path / "pruned", batches)
    assert list(hp.prune_folder(folder, plan, tmp_path / "pruned", batches)) == list(expected)
    assert_same_weights(hp.load(tmp_path / "pruned"), model)


def test_an_empty_calibration_set_is_refused(tmp_path):
    folder = sharded_folder("llama", tmp_path / "model")
    with pytest.raises(InvalidInput, match="empty"):
        hp.prune_folder(folder, plan_for(folder), tmp_path / "pruned", [])


def test_a_cut_that_goes_wrong_is_caught_before_the_folder_appears(tmp_path, monkeypatch):
    folder = sharded_folder("llama", tmp_path / "model")
    module = sys.modules["headprune.surgery.cutting"]
    monkeypatch.setattr(module, "cut_site", lambda site, kept, own=module.cut_site: own(site, tuple(head - 1 for head in kept)))
    with pytest.raises(HeadpruneError, match="failed its own check"):
        hp.prune_folder(folder, plan_for(folder), tmp_path / "pruned")
    assert not (tmp_path / "pruned").exists()


KILLED = """
import os, signal, sys
import headprune as hp
from streamed_models import batches_of_tokens
def progress(done, steps):
    if done == 3:
        os.kill(os.getpid(), signal.SIGKILL)
hp.prune_folder(sys.argv[1], hp.PruningPlan.load(sys.argv[2]), sys.argv[3], batches_of_tokens(), progress=progress)
"""


def test_killed_between_layers_it_goes_on_and_the_weights_are_the_same(tmp_path):
    folder, batches = sharded_folder("llama", tmp_path / "model", num_hidden_layers=4), batches_of_tokens()
    plan, model = plan_for(folder), hp.load(folder)
    plan.save(tmp_path / "plan.json")
    command = [sys.executable, "-c", KILLED, str(folder), str(tmp_path / "plan.json"), str(tmp_path / "pruned")]
    ended = subprocess.run(command, env=environment(), timeout=240)
    assert ended.returncode == -signal.SIGKILL
    solved = {path.name: path.stat().st_ino for path in (tmp_path / ".pruned.work" / "solved").iterdir()}
    assert len(solved) == 6
    hp.prune_folder(folder, plan, tmp_path / "pruned", batches)
    hp.prune(model, plan, batches)
    assert_same_weights(hp.load(tmp_path / "pruned"), model)


def stopped(*arguments):
    raise KeyboardInterrupt


def test_solved_weights_of_nobody_are_not_taken_up(tmp_path, monkeypatch):
    """As where a folder of another run was half thrown away: its run.json is gone, what it solved is still there."""
    folder, batches = sharded_folder("llama", tmp_path / "model"), batches_of_tokens()
    plan, model = plan_for(folder), hp.load(folder)
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["headprune.surgery.prune_folder"], "take_up", stopped)
        with pytest.raises(KeyboardInterrupt):
            hp.prune_folder(folder, plan, tmp_path / "pruned", batches, compensation="bias")
    (tmp_path / ".pruned.work" / "run.json").unlink()
    hp.prune_folder(folder, plan, tmp_path / "pruned", batches)
    hp.prune(model, plan, batches)
    assert_same_weights(hp.load(tmp_path / "pruned"), model)


def test_what_was_solved_with_another_config_is_thrown_away(tmp_path, monkeypatch):
    folder, batches = sharded_folder("llama", tmp_path / "model"), batches_of_tokens()
    plan = plan_for(folder)
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["headprune.surgery.prune_folder"], "take_up", stopped)
        with pytest.raises(KeyboardInterrupt):
            hp.prune_folder(folder, plan, tmp_path / "pruned", batches, compensation="bias")
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 0.5'))
    hp.prune_folder(folder, plan, tmp_path / "pruned", batches, compensation="bias")
    model = hp.load(folder)
    hp.prune(model, plan, batches, compensation="bias")
    assert_same_weights(hp.load(tmp_path / "pruned"), model)


def test_layers_before_the_first_cut_run_once_and_solved_ones_never_again(tmp_path, monkeypatch):
    folder, batches = sharded_folder("llama", tmp_path / "model", num_hidden_layers=4), batches_of_tokens()
    plan = hp.PruningPlan.from_keep(hp.load(folder), {"model.layers.3.self_attn": [0]})
    module, runs = sys.modules["headprune.surgery.streamed_compensation"], []
    own = module.StreamedCompensation._run
    monkeypatch.setattr(
        module.StreamedCompensation, "_run", lambda self, layer, index, kind: runs.append(layer) or own(self, layer, index, kind)
    )
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["headprune.surgery.prune_folder"], "take_up", stopped)
        with pytest.raises(KeyboardInterrupt):
            hp.prune_folder(folder, plan, tmp_path / "pruned", batches)
    assert [runs.count(layer) for layer in range(3)] == [len(batches)] * 3
    runs.clear()
    hp.prune_folder(folder, plan, tmp_path / "pruned", batches)
    assert not runs


def test_what_the_users_data_raise_is_not_called_a_failed_write(tmp_path):
    folder = sharded_folder("llama", tmp_path / "model")

    def batches():
        raise ConnectionError("the server is down")
        yield

    with pytest.raises(ConnectionError, match="the server is down"):
        hp.prune_folder(folder, plan_for(folder), tmp_path / "pruned", batches())
