"""Pruning a model on disk gives, file by file, what pruning it in memory gives."""

import json
import random
import signal
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from child_process import environment
from streamed_models import batches_of_tokens, quantised_folder, sharded_folder
from tiny_decoders import FAMILIES, decoder

import headprune as hp
from headprune.errors import CorruptCheckpoint, InvalidInput, InvalidPlan, UnsupportedModel
from headprune.models.shards import INDEX, open_shards
from headprune.surgery.checkpoint import skeleton


def random_plan(folder, seed: int = 0, emptied: bool = False):
    model, drawn = hp.load(folder), random.Random(seed)
    counts = {site.name: site.head_map.query_heads for site in hp.attention_sites(model)}
    keep = {name: sorted(drawn.sample(range(heads), drawn.randint(1, heads - 1))) for name, heads in counts.items()}
    return hp.PruningPlan.from_keep(model, keep | ({next(iter(keep)): []} if emptied else {}))


@pytest.mark.parametrize("emptied", [False, True])
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "stablelm"])
def test_weights_and_config_are_those_of_the_model_pruned_in_memory(family, emptied, tmp_path):
    folder = sharded_folder(family, tmp_path / "model")
    plan, model = random_plan(folder, seed=emptied, emptied=emptied), hp.load(folder)
    hp.prune(model, plan)
    hp.save(model, tmp_path / "whole", max_shard_size="20KB")
    hp.prune_folder(folder, plan, tmp_path / "files")
    found, expected = hp.load(tmp_path / "files"), hp.load(tmp_path / "whole")
    assert list(found.state_dict()) == list(expected.state_dict())
    assert all(torch.equal(tensor, expected.state_dict()[name]) for name, tensor in found.state_dict().items())
    sections = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("files", "whole")]
    for key in ("headprune", "auto_map", "architectures", "per_layer_config"):
        assert sections[0].get(key) == sections[1].get(key)


@pytest.mark.parametrize("family", ["gemma2", "mimo_v2"])
def test_what_stands_at_padded_tokens_does_not_fail_the_check_of_ragged_groups(family, tmp_path):
    """There eager attention, which these families start with, gives something else than headprune's."""
    folder = sharded_folder(family, tmp_path / "model")
    plan = hp.PruningPlan.from_keep(hp.load(folder), {"model.layers.1.self_attn": [1, 2, 3]})
    hp.prune_folder(folder, plan, tmp_path / "pruned")
    assert not hp.attention_sites(hp.load(tmp_path / "pruned"))[1].head_map.is_uniform


def test_weight_files_in_a_folder_of_their_own_stay_there(tmp_path):
    folder = sharded_folder("llama", tmp_path / "model")
    for path in folder.glob("*.safetensors"):
        (folder / "weights").mkdir(exist_ok=True)
        path.rename(folder / "weights" / path.name)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] = {name: f"weights/{file}" for name, file in index["weight_map"].items()}
    (folder / INDEX).write_text(json.dumps(index))
    plan, model = random_plan(folder), hp.load(folder)
    hp.prune_folder(folder, plan, tmp_path / "pruned")
    hp.prune(model, plan)
    pruned = hp.load(tmp_path / "pruned").state_dict()
    assert all(torch.equal(tensor, pruned[name]) for name, tensor in model.state_dict().items())


def test_a_folder_of_one_file_and_tied_weights(tmp_path):
    sharded_folder("llama", tmp_path / "many", tie_word_embeddings=True)
    hp.save(hp.load(tmp_path / "many"), tmp_path / "one")
    plan = random_plan(tmp_path / "one")
    hp.prune_folder(tmp_path / "one", plan, tmp_path / "pruned")
    assert sorted(path.name for path in (tmp_path / "pruned").glob("*.safetensors*")) == ["model.safetensors"]
    model = hp.load(tmp_path / "pruned")
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_nothing_is_written_for_a_plan_of_another_model(tmp_path):
    folder = sharded_folder("llama", tmp_path / "model")
    plan = random_plan(sharded_folder("llama", tmp_path / "other", num_attention_heads=8))
    with pytest.raises(InvalidPlan, match="another model"):
        hp.prune_folder(folder, plan, tmp_path / "pruned")
    assert not [path for path in tmp_path.iterdir() if "pruned" in path.name]


def test_modules_of_single_heads_are_refused_and_nothing_is_written(tmp_path):
    folder = sharded_folder("stablelm", tmp_path / "model")
    plan = hp.PruningPlan.from_keep(hp.load(folder), {"model.layers.0.self_attn": [1, 2]})
    with pytest.raises(UnsupportedModel, match="numbers modules by head"):
        hp.prune_folder(folder, plan, tmp_path / "pruned")
    assert not [path for path in tmp_path.iterdir() if "pruned" in path.name]


def test_attentions_that_are_quantised_are_refused_and_nothing_is_written(tmp_path):
    """A cut in the files alone would leave their scales as they are."""
    folder = quantised_folder(tmp_path / "model")
    with pytest.raises(UnsupportedModel, match=r"self_attn.* is stored as F8_E4M3, quantised"):
        hp.prune_folder(folder, hp.PruningPlan.from_keep(skeleton(folder), {"model.layers.0.self_attn": [0]}), tmp_path / "pruned")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_where_only_feed_forwards_are_quantised_the_attentions_are_cut(tmp_path, caplog):
    folder = quantised_folder(tmp_path / "model", "mlp.down_proj.weight")
    hp.prune_folder(folder, hp.PruningPlan.from_keep(skeleton(folder), {"model.layers.0.self_attn": [0]}), tmp_path / "pruned")
    assert "was not checked by a forward pass" in caplog.text
    before, after = open_shards(folder), open_shards(tmp_path / "pruned")
    assert set(before) == set(after)
    assert after["model.layers.0.self_attn.q_proj.weight"].shape == (8, 32)
    assert after["model.layers.0.mlp.down_proj.weight"].dtype == "F8_E4M3"


def test_a_gpu_that_is_not_here_is_refused_before_anything_is_written(tmp_path):
    folder = sharded_folder("llama", tmp_path / "model")
    plan = random_plan(folder)
    with pytest.raises(InvalidInput, match="device is 'cuda:99'; this machine has cpu"):
        hp.prune_folder(folder, plan, tmp_path / "pruned", device="cuda:99")
    with pytest.raises(InvalidInput, match="device is 'cuda:99'; this machine has cpu"):
        hp.open_streamed(folder, device="cuda:99")
    assert not [path for path in tmp_path.iterdir() if "pruned" in path.name]


def test_a_missing_file_is_named_and_nothing_is_written(tmp_path):
    folder = sharded_folder("llama", tmp_path / "model")
    plan, victim = random_plan(folder), sorted(folder.glob("*.safetensors"))[-1]
    victim.unlink()
    with pytest.raises(CorruptCheckpoint, match=victim.name):
        hp.prune_folder(folder, plan, tmp_path / "pruned")
    assert not [path for path in tmp_path.iterdir() if "pruned" in path.name]


def test_the_source_and_what_holds_it_are_refused(tmp_path):
    folder = sharded_folder("llama", tmp_path / "model")
    plan, before = random_plan(folder), {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(InvalidInput, match="is the source"):
        hp.prune_folder(folder, plan, folder)
    (tmp_path / "config.json").write_text("{}")  # as a model folder that holds another
    with pytest.raises(InvalidInput, match="holds the source"):
        hp.prune_folder(folder, plan, tmp_path)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


KILLED = """
import os, signal, sys
import headprune as hp
def progress(done, files):
    if done == int(sys.argv[4]):
        os.kill(os.getpid(), signal.SIGKILL)
hp.prune_folder(sys.argv[1], hp.PruningPlan.load(sys.argv[2]), sys.argv[3], progress=progress)
"""


@pytest.mark.parametrize("damaged", [False, True])
def test_killed_between_files_it_goes_on_and_the_bytes_are_the_same(damaged, tmp_path):
    """damaged: as where the machine went down, and a file on the disk is not what was written."""
    folder = sharded_folder("llama", tmp_path / "model")
    plan = random_plan(folder)
    plan.save(tmp_path / "plan.json")
    command = [sys.executable, "-c", KILLED, str(folder), str(tmp_path / "plan.json"), str(tmp_path / "pruned"), "3"]
    ended = subprocess.run(command, env=environment(), timeout=120)
    assert ended.returncode == -signal.SIGKILL
    assert not (tmp_path / "pruned").exists()
    draft = tmp_path / ".pruned.part"
    assert len(list(draft.glob("*.safetensors"))) >= 3
    finished = {name: (draft / name).stat().st_ino for name in json.loads((draft / "digests.json").read_text())["digests"]}
    assert len(finished) == 3
    if damaged:
        name = min(finished)
        del finished[name]
        (draft / name).write_bytes(bytes((draft / name).stat().st_size))
    hp.prune_folder(folder, plan, tmp_path / "pruned")
    assert all((tmp_path / "pruned" / name).stat().st_ino == inode for name, inode in finished.items())
    hp.prune_folder(folder, plan, tmp_path / "at_once")
    assert {path.name: path.read_bytes() for path in (tmp_path / "pruned").iterdir()} == {
        path.name: path.read_bytes() for path in (tmp_path / "at_once").iterdir()
    }


@pytest.mark.parametrize(
    ("name", "content", "way_out"),
    [
        ("digests.json", "{", r"digests\.json is damaged .*\. Remove it to go on: the weight files .* are then written again"),
        ("digests.json", '{"kind": "digests_of_a_folder_being_pruned", "schema_version": 1}', "is damaged .* Remove it to go on"),
        ("run.json", "{", r"run\.json cannot be read as .*\. Remove .*\.pruned\.part to start again: .* is then lost"),
    ],
)
def test_a_damaged_record_of_half_done_work_says_what_removing_it_loses(name, content, way_out, tmp_path):
    folder, draft = sharded_folder("llama", tmp_path / "model"), tmp_path / ".pruned.part"
    plan = random_plan(folder)

    def stopped(done, _files):
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hp.prune_folder(folder, plan, tmp_path / "pruned", progress=stopped)
    assert json.loads((draft / "digests.json").read_text())["digests"]
    (draft / name).write_text(content)
    with pytest.raises(InvalidInput, match=way_out):
        hp.prune_folder(folder, plan, tmp_path / "pruned")
    (draft / name).unlink()
    hp.prune_folder(folder, plan, tmp_path / "pruned")
    assert (tmp_path / "pruned" / "config.json").exists()
    assert not draft.exists()


LIMITED = """
import resource, sys
import headprune as hp
from streamed_models import batches_of_tokens
status = dict(line.split(":") for line in open("/proc/self/status"))
used = 1024 * int(status["VmData"].split()[0])
resource.setrlimit(resource.RLIMIT_DATA, (used + int(sys.argv[3]), resource.RLIM_INFINITY))
batches = [{**batch, "labels": batch["input_ids"]} for batch in batches_of_tokens()]
scores = hp.score(hp.open_streamed(sys.argv[1]), batches, "fisher", loss_fn=hp.causal_losses)
hp.prune_folder(sys.argv[1], hp.plan(scores, hp.Budget(heads=0.5)), sys.argv[2], batches, compensation="bias")
"""


def test_a_model_larger_than_the_memory_that_is_left_is_scored_pruned_and_checked(tmp_path):
    options = {"hidden_size": 256, "intermediate_size": 8192, "num_hidden_layers": 8, "num_attention_heads": 8, "head_dim": 16}
    decoder("llama", **options).save_pretrained(tmp_path / "model", max_shard_size="20MB")
    total = sum(path.stat().st_size for path in (tmp_path / "model").glob("*.safetensors"))
    limit = 128 << 20
    assert total > 1.5 * limit
    command = [sys.executable, "-c", LIMITED, str(tmp_path / "model"), str(tmp_path / "pruned"), str(limit)]
    ended = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=240)
    assert ended.returncode == 0, ended.stderr[-2000:]
    sites = hp.load(tmp_path / "pruned").config.headprune["sites"]
    assert sum(len(site["kept"]) for site in sites.values()) == 32


def test_half_done_work_of_another_compensation_or_of_nobody_is_thrown_away(tmp_path, monkeypatch):
    folder, batches = sharded_folder("llama", tmp_path / "model"), batches_of_tokens()
    plan = random_plan(folder)
    hp.prune_folder(folder, plan, tmp_path / "expected", batches, compensation="bias", verify=False)

    def stopped(*_):
        raise KeyboardInterrupt

    for claimed in (True, False):
        with monkeypatch.context() as patch:
            patch.setattr(sys.modules["headprune.surgery.prune_folder"], "finish", stopped)
            with pytest.raises(KeyboardInterrupt):
                hp.prune_folder(folder, plan, tmp_path / "pruned", batches, verify=False)
        if not claimed:
            (tmp_path / ".pruned.part" / "run.json").unlink()
        hp.prune_folder(folder, plan, tmp_path / "pruned", batches, compensation="bias", verify=False)
        assert all(
            path.read_bytes() == (tmp_path / "expected" / path.name).read_bytes() for path in (tmp_path / "pruned").iterdir()
        )


def test_attentions_that_are_only_guessed_are_refused(tmp_path, monkeypatch):
    folder = sharded_folder("llama", tmp_path / "model")
    plan, module = random_plan(folder), sys.modules["headprune.surgery.prune_folder"]
    guessed = [replace(site, proven=False) for site in hp.attention_sites(hp.load(folder))]
    monkeypatch.setattr(module, "attention_sites", lambda model: guessed)
    with pytest.raises(UnsupportedModel, match="not a known attention"):
        hp.prune_folder(folder, plan, tmp_path / "pruned")
    assert not [path for path in tmp_path.iterdir() if "pruned" in path.name]


def test_what_a_killed_run_had_half_written_is_not_in_the_folder(tmp_path, monkeypatch):
    folder = sharded_folder("llama", tmp_path / "model")
    plan = random_plan(folder)

    def stopped(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["headprune.surgery.prune_folder"], "finish", stopped)
        with pytest.raises(KeyboardInterrupt):
            hp.prune_folder(folder, plan, tmp_path / "pruned")
    (tmp_path / ".pruned.part" / ".model-00001.safetensors.x7f").write_bytes(b"half of it")
    hp.prune_folder(folder, plan, tmp_path / "pruned")
    assert not [path for path in (tmp_path / "pruned").iterdir() if path.name.startswith(".")]


def test_a_weight_file_that_goes_away_meanwhile_is_named(tmp_path, monkeypatch):
    folder = sharded_folder("llama", tmp_path / "model")
    plan, module = random_plan(folder), sys.modules["headprune.surgery.prune_folder"]

    def gone(draft, cutting, steps):
        last = cutting.shards.files[-1]
        (folder / last).unlink()
        return own(draft, cutting, steps)

    own = module.write_shards
    monkeypatch.setattr(module, "write_shards", gone)
    with pytest.raises(CorruptCheckpoint, match=r"model-.*cannot be read any more"):
        hp.prune_folder(folder, plan, tmp_path / "pruned")


def test_where_the_kernel_copies_between_no_files_the_bytes_are_the_same(tmp_path, monkeypatch):
    folder = sharded_folder("llama", tmp_path / "model")
    plan = random_plan(folder)
    hp.prune_folder(folder, plan, tmp_path / "kernel")
    monkeypatch.setattr("headprune.surgery.shard_writer.sys", SimpleNamespace(platform="darwin"))
    monkeypatch.setattr("headprune.surgery.shard_writer.CHUNK", 1000)
    hp.prune_folder(folder, plan, tmp_path / "memory")
    files = sorted(path.name for path in (tmp_path / "kernel").glob("*.safetensors*"))
    assert files
    assert all((tmp_path / "kernel" / name).read_bytes() == (tmp_path / "memory" / name).read_bytes() for name in files)
