"""The Triton weight statistics against the reference in fp64: in the interpreter, and on a GPU where there is one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from weight_cases import assert_exact, check_graph_replay, weight_call

from headprune import ops
from headprune.ops import HeadSlices, triton_weights
from headprune.ops.weight_slices import WeightCall

TESTS = Path(__file__).parents[1]


def check(call: WeightCall) -> None:
    assert_exact(triton_weights.head_weight_stats(call), call)


def check_many_chunks(device: str) -> None:
    """Heads of several chunks, rows and columns; 16-byte aligned, and one element off."""
    torch.manual_seed(0)
    wide = torch.randn(601, 3 * 64, device=device)
    for weight in (torch.randn(2 * 80, 512, device=device), torch.randn(2 * 80, 513, device=device)):
        slices = [HeadSlices.contiguous(weight, 2, 80), HeadSlices.contiguous(wide, 3, 64, dim=1)]
        call = WeightCall.of(slices, [torch.randn_like(weight), torch.randn_like(wide)])
        assert_exact(triton_weights.head_weight_stats(call), call)
    weight[3, 5] = float("nan")
    with ops.backend("triton"):
        (stats,) = ops.head_weight_stats(slices[:1])
    for values in (stats.l1, stats.square, stats.max):
        assert values.isnan().tolist() == [True, False]


INTERPRETED = """
import torch, test_triton_weights as t
t.check(t.weight_call(torch.float32, True))
t.check(t.weight_call(torch.float16, False, most_spans=2))
t.check_many_chunks("cpu")
print("done")
"""


def test_the_kernel_in_the_interpreter_is_as_exact_as_pytorch():
    """In a process of its own: the variable must be set before triton is imported."""
    pytest.importorskip("triton", reason="Triton is not installed")
    path = os.pathsep.join([str(TESTS), str(TESTS / "ops"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "done", done.stderr


def test_what_it_does_not_run_is_refused_with_a_reason():
    assert "cpu tensor" in triton_weights.refuses(weight_call(torch.float32, False))


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_layout_on_a_gpu_is_as_exact_as_pytorch(dtype):
    for grads in (False, True):
        call = weight_call(dtype, grads, "cuda")
        check(call)
        first = triton_weights.head_weight_stats(call)
        assert all(torch.equal(triton_weights.head_weight_stats(call), first) for _ in range(10))
    check_many_chunks("cuda")


@pytest.mark.gpu
@gpu
def test_it_replays_in_a_cuda_graph_with_other_weights():
    check_graph_replay("triton")
