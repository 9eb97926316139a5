"""Recovery under DeepSpeed's ZeRO gives what two plain ranks give. Needs deepspeed, which `make venv` does not install."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from pruned_pairs import pruned_llama, text_batches
from safetensors.torch import load_file

import headprune as hp
from headprune.errors import InvalidInput
from headprune.recovery.training import refuse_partitioned

CASES = ("plain", "none", "optimizer", "gradients", "stopped", "resumed", "partitioned")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    if find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    folder = tmp_path_factory.mktemp("zero")
    script = Path(__file__).parents[1] / "zero_ranks.py"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script), str(folder)]
    environment = os.environ | ({} if torch.cuda.is_available() else {"DS_ACCELERATOR": "cpu"})
    for case in CASES:
        done = subprocess.run([*launch, case], capture_output=True, text=True, timeout=500, env=environment)
        assert done.returncode == 0, f"{case}: {done.stderr[-4000:]}"
    return folder


def weights(folder, case: str, rank: int):
    return load_file(folder / f"{case}{rank}.safetensors")


@pytest.mark.parametrize("case", ["none", "optimizer", "gradients", "resumed"])
def test_ranks_that_share_what_a_stage_says_train_as_plain_ones_do(folder, case):
    expected = weights(folder, "plain", 0)
    for rank in (0, 1):
        assert (folder / f"{case}{rank}.txt").read_text() == "finished"
        found = weights(folder, case, rank)
        assert found.keys() == expected.keys()
        for name, tensor in found.items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-5)
    assert (folder / "stopped0.txt").read_text() == "stopped"


def test_partitioned_parameters_are_refused_on_every_rank_before_training(folder):
    for rank in (0, 1):
        assert "stage 3" in (folder / f"partitioned{rank}.txt").read_text()
        assert all(tensor.numel() for tensor in weights(folder, "partitioned", rank).values())


@pytest.mark.parametrize(("stage", "refused"), [(2, False), (3, True)])
def test_the_stage_is_read_from_the_plugin_wherever_it_came_from(stage, refused):
    config = SimpleNamespace(is_zero3=lambda: stage == 3)
    arguments = SimpleNamespace(deepspeed_plugin=SimpleNamespace(hf_ds_config=config))
    if refused:
        with pytest.raises(InvalidInput, match=r"stage 3 leaves each rank a part of every parameter.*stage 2"):
            refuse_partitioned(arguments)
    else:
        refuse_partitioned(arguments)
    refuse_partitioned(SimpleNamespace(deepspeed_plugin=None))


@pytest.mark.skipif(find_spec("deepspeed") is not None, reason="deepspeed is installed")
def test_deepspeed_that_is_not_there_is_named(tmp_path):
    _, model = pruned_llama()
    with pytest.raises(InvalidInput, match="pip install deepspeed"):
        hp.recover(model, text_batches(), steps=1, output_dir=tmp_path / "run", deepspeed={"zero_optimization": {"stage": 2}})
