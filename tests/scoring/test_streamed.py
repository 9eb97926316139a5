"""Scoring layer by layer measures what a pass over the whole model measures."""

import signal
import subprocess
import sys
from dataclasses import fields

import pytest
import torch
from child_process import environment
from streamed_models import SHARED_LAYERS, SHARING, labelled, sharded_folder
from tiny_decoders import decoder

import headprune as hp
from headprune.errors import InvalidInput
from headprune.scoring.causal_losses import causal_losses
from headprune.scoring.layer_states import LayerStates
from headprune.scoring.passed_keys import PassedKeys

NEEDS = ["weights", "gram", "output_norm", "gate_gradient", "weight_gradient"]
PATTERNS = ["attention", "attention_pattern", "attention_distance", "gate_gradient"]


def assert_same(found, expected):
    assert list(found) == list(expected)
    assert found.seen == expected.seen
    for name, site in expected.items():
        for field in fields(site):
            mine, theirs = getattr(found[name], field.name), getattr(site, field.name)
            assert torch.equal(mine, theirs) if isinstance(theirs, torch.Tensor) else mine == theirs, (name, field.name)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "qwen3_moe", "gemma3", "gpt_oss", "olmo2", "deepseek_v3"])
def test_bit_for_bit(family, tmp_path):
    folder, batches = sharded_folder(family, tmp_path / "model"), [labelled("left"), labelled("right", 2)]
    assert_same(hp.observe(hp.open_streamed(folder), batches, NEEDS), hp.observe(hp.load(folder), batches, NEEDS))


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_attention_patterns_bit_for_bit(family, tmp_path):
    folder, batches = sharded_folder(family, tmp_path / "model"), [labelled("left"), labelled("right", 2)]
    assert_same(hp.observe(hp.open_streamed(folder), batches, PATTERNS), hp.observe(hp.load(folder), batches, PATTERNS))


# Padded on the right: on the left Gemma 3n's own gradients are NaN, of padding embeddings that are 0.
RIGHT = [labelled("right"), labelled("right", 2)]


@pytest.mark.parametrize("needs", [NEEDS, PATTERNS], ids=["gradients", "patterns"])
@pytest.mark.parametrize("where", ["memory", "disk"])
@pytest.mark.parametrize("family", SHARING)
def test_layers_that_read_others_keys_bit_for_bit(family, where, needs, tmp_path):
    folder, work = sharded_folder(family, tmp_path / "model", **SHARED_LAYERS), tmp_path / "work"
    found = hp.observe(hp.open_streamed(folder), RIGHT, needs, checkpoint=work if where == "disk" else None)
    assert_same(found, hp.observe(hp.load(folder), RIGHT, needs))
    assert all(site.gate_gradient.abs().sum() > 0 for site in found.values())
    assert not any(path.is_file() for kind in ("keys", "values", "gradients") for path in work.glob(f"*{kind}/**/*"))


@pytest.mark.parametrize("family", SHARING)
def test_of_shared_keys_those_of_the_layers_that_give_them_are_kept_until_they_were_read(family, tmp_path, monkeypatch):
    folder, kept, most = sharded_folder(family, tmp_path / "model", **SHARED_LAYERS), [], []
    own, dropped = LayerStates.put, PassedKeys.drop_read

    def put(self, kind, layer, *rest):
        own(self, kind, layer, *rest)
        kept.append((kind, layer))
        most.append(len({place for place in self._kept if place[0] != "states"}))

    def drop_read(self, layer, *streams):
        dropped(self, layer, *streams)
        if layer == 6:
            assert not [place for place in self.states._kept if place[0] != "states"]

    monkeypatch.setattr(LayerStates, "put", put)
    monkeypatch.setattr(PassedKeys, "drop_read", drop_read)
    hp.observe(hp.open_streamed(folder), RIGHT, ["gram"])
    assert {layer for kind, layer in kept if kind in ("keys", "values")} == {1, 2}
    assert max(most) == 2 * 2 * len(RIGHT)


@pytest.mark.parametrize("stop", [1, 4, 5])
@pytest.mark.parametrize("family", SHARING)
def test_stopped_within_a_layer_that_reads_keys_their_gradients_count_once(family, stop, tmp_path, monkeypatch):
    folder, left = sharded_folder(family, tmp_path / "model", **SHARED_LAYERS), [stop]
    own = PassedKeys.keep_gradients

    def keep(self, *arguments):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        own(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(PassedKeys, "keep_gradients", keep)
        with pytest.raises(KeyboardInterrupt):
            hp.observe(hp.open_streamed(folder), RIGHT, ["gram", "gate_gradient"], checkpoint=tmp_path / "work")
    found = hp.observe(hp.open_streamed(folder), RIGHT, ["gram", "gate_gradient"], checkpoint=tmp_path / "work")
    assert_same(found, hp.observe(hp.load(folder), RIGHT, ["gram", "gate_gradient"]))


@pytest.mark.parametrize("family", SHARING)
def test_shared_keys_of_layers_that_lost_all_heads_go_on(family, tmp_path):
    model = hp.load(sharded_folder(family, tmp_path / "model", **SHARED_LAYERS))
    names = [site.name for site in hp.attention_sites(model)]
    hp.cut(model, {names[0]: [], names[1]: [], names[2]: [0, 1, 3], names[4]: [], names[5]: [2]})
    folder = hp.save(model, tmp_path / "pruned")
    assert_same(hp.observe(hp.open_streamed(folder), RIGHT, NEEDS), hp.observe(hp.load(folder), RIGHT, NEEDS))


def test_states_on_disk_change_nothing(tmp_path):
    folder, batches = sharded_folder("llama", tmp_path / "model"), [labelled("left"), labelled("right", 2)]
    found = hp.observe(hp.open_streamed(folder), batches, NEEDS, checkpoint=tmp_path / "work")
    assert_same(found, hp.observe(hp.load(folder), batches, NEEDS))
    assert_same(hp.observe(hp.open_streamed(folder), batches, NEEDS, checkpoint=tmp_path / "work"), found)


def test_each_weight_is_read_once_in_each_direction(tmp_path, monkeypatch):
    model = hp.open_streamed(sharded_folder("llama", tmp_path / "model"))
    shards, reads = model.headprune_streamed.shards, []
    original = type(shards).read

    def noted(self, name, pinned=False):
        reads.append(name)
        return original(self, name, pinned)

    monkeypatch.setattr(type(shards), "read", noted)
    hp.observe(model, [labelled()] * 3, ["gram"])
    inside = [name for name in reads if "layers.1." in name]
    assert sorted(inside) == sorted(name for name in shards if "layers.1." in name)


def test_criteria_that_switch_heads_off_are_refused(tmp_path):
    model = hp.open_streamed(sharded_folder("llama", tmp_path / "model"))
    with pytest.raises(InvalidInput, match="ablation cannot be observed layer by layer"):
        hp.score(model, [labelled()], "ablation")


def test_another_pass_in_the_same_folder_is_refused(tmp_path):
    folder = sharded_folder("llama", tmp_path / "model")
    hp.observe(hp.open_streamed(folder), [labelled()], ["gram"], checkpoint=tmp_path / "work")
    with pytest.raises(InvalidInput, match="other batches"):
        hp.observe(hp.open_streamed(folder), [labelled("left")], ["gram"], checkpoint=tmp_path / "work")
    with pytest.raises(InvalidInput, match="other dtype"):
        hp.observe(hp.open_streamed(folder, dtype=torch.float64), [labelled()], ["gram"], checkpoint=tmp_path / "work")
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 0.5'))
    with pytest.raises(InvalidInput, match="other files"):
        hp.observe(hp.open_streamed(folder), [labelled()], ["gram"], checkpoint=tmp_path / "work")
    (folder / "config.json").write_text(config)
    hp.observe(hp.open_streamed(folder), [labelled()], ["gram"], checkpoint=tmp_path / "work")


KILLED = """
import os, signal, sys
import headprune as hp
from headprune.scoring import streamed as _  # noqa: F401
from streamed_models import labelled
steps = int(sys.argv[3])
pass_class = sys.modules["headprune.scoring.streamed"].StreamedPass
for direction in ("_forward", "_backward"):
    def counted(self, layer, *rest, own=getattr(pass_class, direction)):
        global steps
        steps -= 1
        if steps < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return own(self, layer, *rest)
    setattr(pass_class, direction, counted)
model = hp.open_streamed(sys.argv[1])
hp.observe(model, [labelled("left"), labelled("right", 2)], ["gram", "gate_gradient"], checkpoint=sys.argv[2])
"""


def test_killed_in_the_backward_pass_it_goes_on_with_the_same_result(tmp_path):
    folder, batches = sharded_folder("llama", tmp_path / "model", num_hidden_layers=4), [labelled("left"), labelled("right", 2)]
    command = [sys.executable, "-c", KILLED, str(folder), str(tmp_path / "work"), "5"]
    ended = subprocess.run(command, env=environment(), capture_output=True, timeout=120)
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()[-2000:]
    found = hp.observe(hp.open_streamed(folder), batches, ["gram", "gate_gradient"], checkpoint=tmp_path / "work")
    assert_same(found, hp.observe(hp.load(folder), batches, ["gram", "gate_gradient"]))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "cohere"])
def test_the_causal_loss_in_parts_is_the_loss_of_each_sample(family, tmp_path):
    folder, batch = sharded_folder(family, tmp_path / "model"), labelled()
    model = hp.load(folder)
    with torch.no_grad():
        expected = torch.stack([model(**{name: value[row : row + 1] for name, value in batch.items()}).loss for row in range(3)])
        torch.testing.assert_close(causal_losses(model, batch, 7), expected, rtol=1e-5, atol=1e-6)


def test_the_causal_loss_of_a_batch_without_labels_is_nan_as_the_models_own_is():
    """As 0 it made every score 0, by which plans took the first heads."""
    model, batch = decoder("llama"), labelled()
    one = batch["labels"].clone()
    one[0] = -100
    assert causal_losses(model, batch | {"labels": one}).ne(0).tolist() == [False, True, True]
    with pytest.raises(InvalidInput, match="none of its labels counts"):
        hp.score(model, [batch | {"labels": torch.full_like(batch["labels"], -100)}], "fisher", loss_fn=causal_losses)


def test_streamed_scores_of_the_causal_loss_equal_those_in_memory(tmp_path):
    folder, batch = sharded_folder("llama", tmp_path / "model"), labelled()
    found = hp.score(hp.open_streamed(folder), [batch], "fisher", loss_fn=hp.causal_losses)
    for checkpointing in (False, True):
        expected = hp.score(hp.load(folder), [batch], "fisher", loss_fn=hp.causal_losses, checkpointing=checkpointing)
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_pass_without_gradients_goes_on_behind_its_last_layer(tmp_path, monkeypatch):
    folder, batches = sharded_folder("llama", tmp_path / "model", num_hidden_layers=4), [labelled("left"), labelled("right", 2)]
    kind, layers = sys.modules["headprune.scoring.streamed"].StreamedPass, []
    own = kind._run
    monkeypatch.setattr(kind, "_run", lambda self, layer, index: layers.append(layer) or own(self, layer, index))

    def stop(self, layer, *rest):
        if layer == 3:
            raise KeyboardInterrupt
        return forward(self, layer, *rest)

    forward = kind._forward
    with monkeypatch.context() as patch:
        patch.setattr(kind, "_forward", stop)
        with pytest.raises(KeyboardInterrupt):
            hp.observe(hp.open_streamed(folder), batches, ["gram"], checkpoint=tmp_path / "work")
    assert layers == [0, 0, 1, 1, 2, 2]
    layers.clear()
    found = hp.observe(hp.open_streamed(folder), batches, ["gram"], checkpoint=tmp_path / "work")
    assert layers == [3, 3]
    assert_same(found, hp.observe(hp.load(folder), batches, ["gram"]))
