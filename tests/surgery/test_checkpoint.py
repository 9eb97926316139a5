import copy
import json
import os
import resource
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from tiny_encoders import SEQ2SEQ, VISION
from tiny_models import bert, hidden, llama, padded, tokens
from transformers import BertModel
from transformers.utils.logging import warning_once

from headprune.errors import CorruptCheckpoint, HeadpruneError, InvalidInput, UnsupportedModel
from headprune.models import attention_sites
from headprune.planning import PruningPlan
from headprune.surgery import cut, load, prune_folder, save
from headprune.surgery.checkpoint import skeleton

PLANS = {
    "llama": (llama, {"model.layers.0.self_attn": [0, 1, 3], "model.layers.1.self_attn": [2]}),
    "bert": (bert, {"encoder.layer.0.attention": [1], "encoder.layer.1.attention": [0, 2, 3]}),
    "tied": (lambda: llama(tie_word_embeddings=True), {"model.layers.0.self_attn": [4, 5]}),
    "dense": (bert, {}),
    "emptied": (llama, {"model.layers.0.self_attn": []}),
}


def pruned(family: str):
    make, keep = PLANS[family]
    model = make()
    cut(model, keep)
    return model


@pytest.mark.parametrize("family", PLANS)
def test_a_pruned_model_survives_the_disk(tmp_path, family):
    model = pruned(family)
    save(model, tmp_path / "model")
    again = load(tmp_path / "model")
    assert type(again).__name__ == type(model).__name__
    assert torch.equal(hidden(again, **padded()), hidden(model, **padded()))
    assert [site.head_map for site in attention_sites(again)] == [site.head_map for site in attention_sites(model)]
    save(again, tmp_path / "again")
    assert torch.equal(hidden(load(tmp_path / "again"), **padded()), hidden(model, **padded()))
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["again", "model"]


def test_transformers_does_not_warn_of_its_own_checks(tmp_path, caplog):
    """Which read counts that each layer has of its own."""
    warning_once.cache_clear()
    save(pruned("llama"), tmp_path / "model")
    load(tmp_path / "model").save_pretrained(tmp_path / "again")
    save(llama(), tmp_path / "dense")
    prune_folder(tmp_path / "dense", PruningPlan.from_keep(llama(), PLANS["llama"][1]), tmp_path / "in-files")
    assert not [record.getMessage() for record in caplog.records if "per-layer" in record.getMessage()]


def test_ragged_groups_run_through_headprune_unless_another_attention_is_named(tmp_path):
    folder = save(pruned("llama"), tmp_path / "model")
    assert load(folder).config._attn_implementation == "headprune"
    eager = load(folder, attn_implementation="eager")
    assert eager.config._attn_implementation == "eager"
    assert torch.allclose(hidden(eager, **padded()), hidden(load(folder), **padded()), atol=1e-5)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dtype": "foo"}, r"dtype is 'foo'; expected a floating-point torch\.dtype"),
        ({"torch_dtype": 3}, "torch_dtype is 3; expected"),
        ({"dtype": torch.int8}, r"dtype is torch\.int8; expected a floating-point torch\.dtype"),
        ({"revision": "v1"}, "revision is 'v1'; leave it out and give it with the name, as owner/name@revision"),
        ({"subfolder": "inside"}, "subfolder is 'inside'; leave it out and give the path of that folder"),
        ({"device_map": {}}, "device_map is {}; expected a device for each module"),
        ({"device_map": "foo"}, "device_map is 'foo'; expected a device"),
        ({"device_map": {"": "cuda:77"}}, "device is 'cuda:77'; this machine has cpu"),
        ({"device_map": []}, r"device_map is \[\]; expected a device"),
    ],
)
def test_a_wrong_option_is_no_corrupt_folder(options, said, tmp_path):
    folder = save(bert(), tmp_path / "model")
    with pytest.raises(InvalidInput, match=said):
        load(folder, **options)


def test_dtypes_and_places_by_any_of_their_names_are_taken(tmp_path):
    folder = save(bert(), tmp_path / "model")
    for options in ({"dtype": "bfloat16"}, {"torch_dtype": torch.bfloat16, "device_map": "cpu"}):
        assert load(folder, **options).dtype is torch.bfloat16
    assert load(folder, dtype="auto", device_map={"": torch.device("cpu")}).dtype is torch.float32


def test_a_package_that_is_not_here_is_named(tmp_path):
    folder = save(bert(), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "quanto", "weights": "int8"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InvalidInput, match=r"does not load without another package: .*quanto"):
        load(folder)


def test_weights_that_are_one_and_not_tied_are_named(tmp_path):
    model = llama()
    model.model.layers[1].self_attn = model.model.layers[0].self_attn
    said = r"layers\.0\.self_attn\.\w+\.weight and model\.layers\.1\.self_attn\.\w+\.weight are one"
    with pytest.raises(UnsupportedModel, match=said):
        save(model, tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_a_loaded_model_can_be_pruned_further(tmp_path):
    model = pruned("llama")
    save(model, tmp_path / "model")
    again = load(tmp_path / "model")
    for found in (model, again):
        cut(found, {"model.layers.0.self_attn": [1, 2]})
    assert again.config.headprune["sites"]["model.layers.0.self_attn"]["kept"] == [1, 3]
    assert torch.equal(hidden(again, input_ids=tokens()), hidden(model, input_ids=tokens()))


def test_a_ragged_model_loads_with_the_attention_that_is_named(tmp_path):
    model = pruned("llama")
    save(model, tmp_path / "model")
    assert load(tmp_path / "model").config._attn_implementation == "headprune"
    eager = load(tmp_path / "model", attn_implementation="eager")
    assert eager.config._attn_implementation == "eager"
    assert torch.allclose(hidden(eager, **padded()), hidden(model, **padded()), atol=1e-5)


def test_a_model_that_was_cut_by_way_of_its_base_survives_the_disk(tmp_path):
    model, name = pruned("llama"), "layers.0.self_attn"
    cut(model.model, {name: [1, 2]})
    assert model.config.headprune["sites"][name]["kept"] == [1, 3]
    again = load(save(model, tmp_path / "model"))
    assert torch.allclose(hidden(again, **padded()), hidden(model, **padded()), atol=1e-5)
    cut(again, {f"model.{name}": [1]})
    assert again.config.headprune["sites"][f"model.{name}"]["kept"] == [3]


def test_a_part_that_was_cut_by_itself_is_named(tmp_path):
    model = VISION["clip"].make()
    cut(model.vision_model, {"encoder.layers.0.self_attn": [1]})
    with pytest.raises(InvalidInput, match=r"vision_model\.encoder\.layers\.0\.self_attn was cut in a part"):
        save(model, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_part_that_shares_the_config_of_the_whole_and_was_cut_by_itself_is_named(tmp_path):
    model = SEQ2SEQ["bart"].make()
    cut(model.model.encoder, {"layers.0.self_attn": [0, 1]})
    for use in (lambda: save(model, tmp_path / "model"), lambda: cut(model, {"model.decoder.layers.0.self_attn": [0]})):
        with pytest.raises(InvalidInput, match=r"no module layers\.0\.self_attn.* Cut by way of the whole model"):
            use()
    assert not (tmp_path / "model").exists()


def test_ranks_beside_the_main_process_write_nothing(tmp_path):
    model = pruned("bert")
    save(model, tmp_path / "model")
    before = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    save(model, tmp_path / "model", is_main_process=False)
    save(model, tmp_path / "other", is_main_process=False)
    assert {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()} == before
    assert list(tmp_path.iterdir()) == [tmp_path / "model"]


def test_shards_and_dtype_are_kept(tmp_path):
    model = pruned("llama").to(torch.bfloat16)
    save(model, tmp_path / "model", max_shard_size="20KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1
    again = load(tmp_path / "model", dtype=torch.bfloat16)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_shard_size": "abc"}, "max_shard_size is 'abc'; expected a number of bytes, 1 or more, or a size such as '5GB'"),
        ({"max_shard_size": "5"}, "max_shard_size is '5'; expected"),
        ({"max_shard_size": None}, "max_shard_size is None; expected"),
        ({"max_shard_size": -1}, "max_shard_size is -1; expected"),
        ({"variant": 7}, "variant is 7; expected a string or None"),
        ({"is_main_process": "no"}, "is_main_process is 'no'; expected True or False"),
        ({"push_to_hub": True}, r"would upload half of the folder; call push_to_hub\(name\)"),
        ({"commit_message": "mine"}, "unknown option of save 'commit_message'"),
    ],
)
def test_a_wrong_option_of_save_is_told_before_anything_is_written(options, said, tmp_path):
    with pytest.raises(InvalidInput, match=said):
        save(bert(), tmp_path / "model", **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", ["0.02mb", " 20 KB", 20_000])
def test_sizes_of_weight_files_as_transformers_takes_them(size, tmp_path):
    assert len(list(save(bert(), tmp_path / "model", max_shard_size=size).glob("*.safetensors"))) > 1


def test_the_skeleton_has_the_shapes_and_no_weights(tmp_path):
    model = pruned("llama")
    save(model, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    bones = skeleton(tmp_path / "model")
    assert {parameter.device.type for parameter in bones.parameters()} == {"meta"}
    assert {name: value.shape for name, value in bones.state_dict().items()} == {
        name: value.shape for name, value in model.state_dict().items()
    }


def test_saving_replaces_a_folder_only_when_all_is_written(tmp_path, monkeypatch):
    target = tmp_path / "model"
    save(pruned("bert"), target)
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    model = pruned("llama")

    def interrupted(folder, **_):
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(model, "save_pretrained", interrupted)
    with pytest.raises(HeadpruneError, match="the disk is full"):
        save(model, target)
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before
    assert list(tmp_path.iterdir()) == [target]


def test_a_disk_that_takes_no_more_leaves_nothing_behind(tmp_path):
    """For real: a child process that may write files of at most 4 KiB."""
    save(llama(), tmp_path / "dense")
    script = (
        "import resource, signal, sys;"
        "from headprune.surgery import load, save; from headprune.errors import HeadpruneError;"
        "model = load(sys.argv[1]);"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, (4096, {resource.RLIM_INFINITY}));"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "try:\n    save(model, sys.argv[2])\n"
        "except HeadpruneError as error:\n    print('refused:', error)"
    )
    target = tmp_path / "out" / "model"
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "dense"), str(target)], capture_output=True, text=True, check=True
    )
    assert f"refused: cannot write {target}" in done.stdout, done.stderr
    assert not (tmp_path / "out").exists()


@contextmanager
def without_privileges():
    """As a user to whom permissions apply; root may write anywhere."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


@pytest.fixture
def open_folder():
    """A folder that every user may read and enter, whoever runs the tests."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def test_a_read_only_folder_is_named_and_stays_as_it_was(open_folder):
    model, target = pruned("llama"), open_folder / "models" / "model"
    save(model, target)
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    weights = copy.deepcopy(model.state_dict())
    target.parent.chmod(0o555)
    for folder in (target, target.parent / "new"):
        with without_privileges(), pytest.raises(HeadpruneError, match=f"cannot write {folder}: Permission denied"):
            save(model, folder)
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before
    assert list(target.parent.iterdir()) == [target]
    target.parent.chmod(0o755)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_a_folder_that_is_no_model_is_named(tmp_path):
    with pytest.raises(InvalidInput, match=r"no config\.json\. Give a folder that save_pretrained wrote, or a name on the Hub\."):
        load(tmp_path)
    save(bert(), tmp_path / "run" / "model")  # as `headprune run` leaves it
    with pytest.raises(InvalidInput, match=rf"no config\.json\. Give {tmp_path}/run/model\."):
        load(tmp_path / "run")
    (tmp_path / "config.json").write_text('{"model_type": "no-such-type"}')
    with pytest.raises(InvalidInput, match="no model folder that transformers knows"):
        load(tmp_path)


def change_config(folder, change):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def test_a_config_and_weights_that_disagree_are_refused(tmp_path):
    target = tmp_path / "model"
    save(pruned("bert"), target)
    change_config(target, lambda config: config["headprune"]["sites"]["encoder.layer.0.attention"].update(kept=[0, 1]))
    with pytest.raises(CorruptCheckpoint, match=r"config\.json.*not those that were saved"):
        load(target)
    with pytest.raises(CorruptCheckpoint, match=rf"{target}.*attention"):
        load(target, verify=False)


def test_a_newer_or_broken_section_is_refused(tmp_path):
    target = tmp_path / "model"
    save(pruned("bert"), target)
    change_config(target, lambda config: config["headprune"].update(version=99))
    with pytest.raises(CorruptCheckpoint, match="version 99"):
        load(target)
    change_config(target, lambda config: config["headprune"].update(version=1, sites={"encoder.layer.0.attention": {}}))
    with pytest.raises(CorruptCheckpoint, match="incomplete"):
        load(target)
    change_config(target, lambda config: config.update(headprune="keep all"))
    with pytest.raises(CorruptCheckpoint, match="section of the config is 'keep all'"):
        load(target)


def test_an_unknown_attention_function_is_not_said_to_be_a_corrupt_folder(tmp_path):
    save(pruned("bert"), tmp_path / "model")
    with pytest.raises(InvalidInput, match=r"unknown attn_implementation 'sdap'. Did you mean 'sdpa'\?"):
        load(tmp_path / "model", attn_implementation="sdap")


@pytest.mark.parametrize(
    "options",
    [
        {"quantization_config": {"quant_method": "nonsense"}},
        {"quantization_config": 8},
        {"gguf_file": 7},
        {"device_map": "auto", "max_memory": "all"},
    ],
)
def test_what_from_pretrained_does_not_take_is_not_said_to_be_a_corrupt_folder(options, tmp_path):
    save(pruned("bert"), tmp_path / "model")
    name = list(options)[-1]
    with pytest.raises(InvalidInput, match=rf"{tmp_path}/model does not load as BertModel with {name}: ."):
        load(tmp_path / "model", **options)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory."), MemoryError(), RuntimeError("DefaultCPUAllocator: no")]
)
def test_too_little_memory_is_not_said_to_be_a_corrupt_folder(error, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise error

    bert().save_pretrained(tmp_path / "model")
    monkeypatch.setattr(BertModel, "from_pretrained", fail)
    with pytest.raises(
        HeadpruneError, match=rf"{tmp_path}/model does not fit into memory as BertModel; give a smaller dtype"
    ) as caught:
        load(tmp_path / "model")
    assert type(caught.value) is HeadpruneError


def test_a_state_dict_that_is_none_is_refused(tmp_path):
    with pytest.raises(InvalidInput, match="state_dict is 7; expected a dict of tensors"):
        save(bert(), tmp_path / "model", state_dict=7)
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("option", ["config", "local_files_only", "output_loading_info", "ignore_mismatched_sizes", "state_dict"])
def test_what_load_gives_from_pretrained_itself_is_refused_by_name(option, tmp_path):
    save(bert(), tmp_path / "model")
    with pytest.raises(InvalidInput, match=f"load sets {option} itself; leave it out"):
        load(tmp_path / "model", **{option: None})


def test_a_config_that_names_attentions_of_another_model_is_refused(tmp_path):
    save(pruned("bert"), tmp_path / "model")
    change_config(tmp_path / "model", lambda config: config["headprune"].update(sites={"layers.0.self_attn": {"kept": [0]}}))
    (tmp_path / "model" / "headprune.json").unlink()
    for read in (skeleton, load):
        with pytest.raises(CorruptCheckpoint, match=r"has no module layers\.0\.self_attn"):
            read(tmp_path / "model")


def test_missing_weights_are_named(tmp_path):
    target = tmp_path / "model"
    save(pruned("bert"), target)
    (target / "model.safetensors").unlink()
    with pytest.raises(CorruptCheckpoint, match=r"model\.safetensors"):
        load(target)


def test_weights_of_another_tool_that_were_cut_short_are_named(tmp_path):
    bert().save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CorruptCheckpoint, match=rf"{tmp_path}/model does not load as BertModel: .*header"):
        load(tmp_path / "model")


def test_a_target_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InvalidInput, match="is a file"):
        save(bert(), tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"
