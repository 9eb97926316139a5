"""A folder of about 3 GB, random weights in a Llama shape, on the CPU: pruned file by file, beside a plain copy of its files."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

import headprune as hp

SHAPE = {
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 22, "num_attention_heads": 32, "num_key_value_heads": 8,
    "vocab_size": 32000,
}  # fmt: skip
MEMORY = 1_500_000_000  # bytes, beside what Python and the libraries take
LIMITED = """
import resource, sys
import torch, headprune as hp
status = dict(line.split(":") for line in open("/proc/self/status"))
used = 1024 * int(status["VmData"].split()[0])
resource.setrlimit(resource.RLIMIT_DATA, (used + int(sys.argv[3]), resource.RLIM_INFINITY))
plan = hp.PruningPlan.load(sys.argv[4])
ids = torch.randint(1, 32000, (2, 64), generator=torch.Generator().manual_seed(0))
batches = [{"input_ids": ids}, {"input_ids": ids + 1}]
hp.prune_folder(sys.argv[1], plan, sys.argv[2], batches if sys.argv[5] == "compensate" else None, compensation="bias", verify=False)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """One weight file for each layer, as a large model has them."""
    target = tmp_path_factory.mktemp("large") / "model"
    target.mkdir()
    config = LlamaConfig(**SHAPE, dtype=torch.bfloat16, architectures=["LlamaForCausalLM"])
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in LlamaForCausalLM(config).state_dict().items()}
    drawn = (0.02 * torch.randn(1 << 26, generator=torch.Generator().manual_seed(0))).bfloat16()
    groups: dict[str, dict[str, torch.Tensor]] = {}
    for name, shape in shapes.items():
        part = name.split(".")[2] if ".layers." in name else "rest"
        groups.setdefault(part, {})[name] = drawn[: shape.numel()].clone().view(shape)
    weight_map = {}
    for number, tensors in enumerate(groups.values()):
        file = f"model-{number:05d}.safetensors"
        save_file(tensors, target / file, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    (target / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config.save_pretrained(target)
    return target


@pytest.fixture(scope="module")
def plan(folder):
    model = hp.open_streamed(folder)
    return hp.plan(hp.score(model, (), "random"), hp.Budget(heads=0.5))


def test_pruning_a_folder_file_by_file(versus, folder, plan):
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 1e9
    targets = {name: folder.with_name(name) for name in ("pruned", "copied")}

    def fresh():
        """No target, and nothing of an earlier round that still waits to be written to the disk."""
        for target in targets.values():
            shutil.rmtree(target, ignore_errors=True)
        os.sync()

    def pruned():
        hp.prune_folder(folder, plan, targets["pruned"], verify=False)

    def copied():
        shutil.copytree(folder, targets["copied"], dirs_exist_ok=True)

    versus(
        f"CPU pruning of a folder of {size:.1f} GB, file by file, half of the heads", pruned, {"copy of the folder": copied},
        at_least=0.6, rounds=21, before=fresh,
    )  # fmt: skip
    fresh()


@pytest.mark.parametrize("work", ["cut", "compensate"])
def test_pruning_within_half_of_the_folder_s_size(folder, plan, work, tmp_path):
    """No row: the child fails where it asks for more memory than it is allowed."""
    assert sum(path.stat().st_size for path in folder.glob("*.safetensors")) > 1.9 * MEMORY
    plan.save(tmp_path / "plan.json")
    command = [sys.executable, "-c", LIMITED, str(folder), str(tmp_path / "pruned"), str(MEMORY), str(tmp_path / "plan.json"), work]
    ended = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}, stderr=subprocess.PIPE
    )
    assert ended.returncode == 0, ended.stderr.decode()[-2000:]
