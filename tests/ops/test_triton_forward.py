"""The Triton forward kernel, in Triton's interpreter everywhere and on a GPU where there is one, over the same cases."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from attention_cases import CASES, PACKED_CASES, Case, build, check, check_packed, failures, implementation, in_double, stretched

from headprune.head_map import HeadMap
from headprune.ops import reference

HALF_CASES = [*CASES[::2], PACKED_CASES[-1]]
LONG_CASES = [
    Case(f"head_dim {dim}{', causal' * causal}", HeadMap((0, 0, 0, 1), 2), 1000, 1234, dim, dim, causal, stats=causal)
    for dim in (64, 96, 128, 256)
    for causal in (False, True)
]
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
names = {"ids": lambda value: str(getattr(value, "name", value)).removeprefix("torch.")}


def interpreted() -> list[str]:
    """What fails in the interpreter, on the CPU; bf16 is wrong there."""
    torch.set_num_threads(1)
    every = failures([*CASES, *PACKED_CASES], "cpu", torch.float32, "triton")
    return every + failures(HALF_CASES, "cpu", torch.float16, "triton") + with_the_lowest_bias() + with_copies()


def with_the_lowest_bias() -> list[str]:
    """What fails where masks are filled with the lowest number: a row of nothing else attends to all keys alike."""
    from headprune.ops.triton import attention_forward

    call = build(Case("lowest bias", extras="bias"), "cpu", torch.float32)
    call.bias[:, :, 1] = torch.finfo(torch.float32).min
    error = (attention_forward(call)[0].double() - reference.attention_forward(in_double(call))[0]).abs().max()
    return [] if error < 1e-6 else [f"lowest bias: {error}"]


def with_copies() -> list[str]:
    """What fails with the copies that Hopper needs (kernels/aligned.py), which the interpreter does not."""
    from headprune.kernels import attention_forward

    attention_forward.concerned = lambda tensor: True
    torch.use_deterministic_algorithms(True)  # memory that nobody has written holds NaN
    odd = [case for case in CASES if case.name in ("head_dim 96, value_dim 33", "everything", "statistics")]
    return failures([*odd, replace(PACKED_CASES[-1], value_dim=33)], "cpu", torch.float16, "triton")


def test_triton_in_its_interpreter_is_as_exact_as_pytorch():
    """In a process of its own: the variable must be set before triton is imported."""
    pytest.importorskip("triton", reason="Triton is not installed")
    script = "import test_triton_forward as t; print(*t.interpreted(), 'done', sep=chr(10))"
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "done", done.stdout + done.stderr


# Lengths times nine span several of a GPU's tiles.
@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize(
    ("case", "dtype"),
    [(stretched(case, 9), torch.bfloat16) for case in CASES]
    + [(stretched(case, 9), dtype) for case in HALF_CASES[:-1] for dtype in (torch.float16, torch.float32)]
    + [(case, torch.bfloat16) for case in [*CASES[::4], *LONG_CASES]],
    **names,
)
def test_triton_on_a_gpu_is_as_exact_as_pytorch(case, dtype):
    check(case, "cuda", dtype, "triton")


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], **names)
@pytest.mark.parametrize("case", PACKED_CASES, **names)
def test_triton_on_a_gpu_is_as_exact_as_pytorch_on_packed_sequences(case, dtype):
    check_packed(stretched(case, 40), "cuda", dtype, "triton")


@pytest.mark.gpu
@needs_cuda
def test_two_runs_give_the_same_bits():
    call = build(Case("statistics", HeadMap.uniform(24, 8), 3000, 3000, 64, 64, causal=True, stats=True), "cuda", torch.bfloat16)
    run = implementation("attention", "triton")
    assert all(torch.equal(one, two) for one, two in zip(run(call), run(call)))


@pytest.mark.gpu
@needs_cuda
def test_elements_behind_the_first_two_billion_are_reached():
    case = Case("far", HeadMap.uniform(2, 1), 200, 700, 64, 64, causal=True)
    call = build(case, "cuda", torch.bfloat16)
    expected = implementation("attention", "triton")(call)
    stride = 2**22
    if torch.cuda.mem_get_info()[0] < 4 * 700 * stride:
        pytest.skip("needs 12 GB of free memory")
    far = torch.empty(700 * stride, device="cuda", dtype=torch.bfloat16).as_strided((1, 1, 700, 64), (0, 0, stride, 1))
    far.copy_(call.key)
    assert torch.equal(implementation("attention", "triton")(replace(call, key=far))[0], expected[0])
