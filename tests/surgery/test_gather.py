"""The copy that surgery is gives what index_select gives."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaModel

from headprune.surgery import cut
from headprune.surgery.gather import LARGE, block_of, fresh, gathered, launched


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_it_is_index_select(data):
    dim, width = data.draw(st.integers(0, 2)), data.draw(st.sampled_from([1, 2, 3, 8]))
    shape = data.draw(st.lists(st.integers(1, 5), min_size=3, max_size=3))
    shape[dim] *= width
    heads = sorted(data.draw(st.sets(st.integers(0, shape[dim] // width - 1))))
    entries = (torch.tensor(heads, dtype=torch.long)[:, None] * width + torch.arange(width)).flatten()
    tensor = torch.randn(shape).to(data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.int64])))
    for laid_out in (tensor, tensor.transpose(0, 2).contiguous().transpose(0, 2)):
        found = gathered(laid_out, dim, entries)
        assert torch.equal(found, tensor.index_select(dim, entries))
        assert found.is_contiguous()


@pytest.mark.parametrize(
    ("entries", "length", "block"), [([0, 1, 2, 3], 8, 4), ([4, 5, 6, 7, 10, 11], 12, 2), ([1, 2, 3, 4], 8, 1), ([3], 4, 1)]
)
def test_blocks_are_as_long_as_the_runs_allow(entries, length, block):
    assert block_of(torch.tensor(entries), length) == block


def test_large_memory_is_ordinary_memory():
    found = fresh([3, LARGE], torch.uint8).fill_(2)
    assert found.sum() == 6 * LARGE


def check_one_launch(device: str) -> None:
    """Weights by rows and by columns, a bias, a table, other dtypes and odd sizes, one that keeps nothing."""
    torch.manual_seed(0)
    requests = []
    for shape, dim, width, kept in [
        ((6 * 16, 64), 0, 16, [0, 2, 3, 5]), ((64, 6 * 16), 1, 16, [0, 2, 3, 5]), ((6 * 16,), 0, 16, [1]), ((70, 5 * 3), 1, 3, [4]),
        ((5 * 3, 7), 0, 3, [0, 1, 4]), ((32, 6), 1, 1, [0, 5]), ((2, 6, 5), 1, 1, [1, 2, 3]), ((4 * 16, 8), 0, 16, []),
    ]:  # fmt: skip
        features = (torch.tensor(kept, dtype=torch.long)[:, None] * width + torch.arange(width)).flatten()
        requests.append((torch.randn(shape, device=device), dim, features))
    halves = [(tensor.half(), dim, features) for tensor, dim, features in requests]
    for some in (requests, halves, requests[:3] + halves[:3], requests[:2], requests[-1:]):
        for found, (tensor, dim, features) in zip(launched(some), some, strict=True):
            assert torch.equal(found, tensor.index_select(dim, features.to(device)))
            assert found.is_contiguous()


def test_one_launch_gives_the_same_in_the_interpreter():
    """In a process of its own: the variable must be set before triton is imported."""
    pytest.importorskip("triton", reason="Triton is not installed")
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
    script = "import test_gather as t; t.check_one_launch('cpu'); print('done')"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "done", done.stderr


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@gpu
def test_one_launch_gives_the_same_on_a_gpu():
    check_one_launch("cuda")


@pytest.mark.gpu
@gpu
def test_a_layer_on_a_gpu_is_cut_by_one_kernel():
    config = LlamaConfig(
        hidden_size=256, intermediate_size=64, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4, head_dim=32,
        vocab_size=50, attention_bias=True,
    )  # fmt: skip
    whole = LlamaModel(config).cuda()
    keep = {"layers.0.self_attn": [0, 2, 3], "layers.1.self_attn": [1, 5, 6, 7]}
    host = copy.deepcopy(whole).cpu()
    cut(host, keep, verify=False)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        cut(whole, keep, verify=False)
        torch.cuda.synchronize()
    kernels = [event.name for event in profile.events() if "gather_heads" in event.name or "index" in event.name]
    assert len(kernels) == 2, kernels
    for (name, mine), theirs in zip(whole.state_dict().items(), host.state_dict().values(), strict=True):
        assert torch.equal(mine.cpu(), theirs), name
