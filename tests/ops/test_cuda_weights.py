"""The CUDA weight statistics against the reference in fp64: on the CPU through an emulated warp, and on a GPU if there is one."""

import ctypes
import platform
import shutil
import subprocess
from ctypes import POINTER, Structure, c_int, c_uint, c_void_p
from pathlib import Path

import pytest
import torch
from weight_cases import assert_exact, check_graph_replay, weight_call

from headprune.kernels.weight_plan import address_table, addresses_of, chunk_plan, matrices_of, row_length
from headprune.ops import HeadSlices, cuda, cuda_weights
from headprune.ops.weight_slices import WeightCall

ROOT = Path(__file__).parents[2]
ELEMENTS = [torch.float32, torch.float16, torch.bfloat16]


class Problem(Structure):
    """WeightProblem of csrc/cuda/weight_stats.h."""

    _fields_ = [
        ("element", c_int), ("whole", c_int), *((name, c_void_p) for name in ("weights", "grads", "chunks", "offsets")),
        ("chunk_count", c_int), ("heads", c_int), *((name, c_void_p) for name in ("partial", "arrived", "stats")),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def emulator(tmp_path_factory):
    """`emulate_weights(problem, seed)`, the kernel's own source compiled for the CPU."""
    if platform.machine() != "x86_64" or not shutil.which("g++"):
        pytest.skip("the emulated warp needs g++ and an x86-64 processor")
    library = tmp_path_factory.mktemp("emulator") / "emulate.so"
    flags = ["-O1", "-std=c++20", "-mf16c", "-shared", "-fPIC", "-Wno-unknown-pragmas", f"-I{ROOT / 'csrc/cuda'}"]
    subprocess.run(["g++", *flags, str(ROOT / "tests/ops/emulate_weights.cpp"), "-o", str(library)], check=True)
    loaded = ctypes.CDLL(str(library))
    assert loaded.problem_size() == ctypes.sizeof(Problem)
    loaded.emulate_weights.argtypes = [POINTER(Problem), c_uint]
    return loaded.emulate_weights


def emulated(emulator, call: WeightCall, seed: int) -> torch.Tensor:
    """What the kernel writes, its blocks running one after another in an order that `seed` decides."""
    call = call.readable()
    matrices = matrices_of(call.weights, call.dims)
    cpu = torch.device("cpu")
    plan = chunk_plan(matrices, call.spans, call.heads, row_length(matrices, call.spans), cpu)
    tables = [address_table(addresses_of(tensors), cpu) for tensors in (call.weights, call.grads)]
    aligned = all(int(place) % 16 == 0 for table in tables for place in table)
    partial = torch.full((len(plan.table), 6), float("nan"))
    arrived, stats = torch.zeros(call.heads, dtype=torch.int32), torch.zeros(call.statistics, call.heads)
    problem = Problem(
        ELEMENTS.index(call.dtype), plan.whole if aligned else 1, tables[0].data_ptr(),
        tables[1].data_ptr() if call.grads else None, plan.table.data_ptr(), plan.offsets.data_ptr(), len(plan.table), call.heads,
        partial.data_ptr(), arrived.data_ptr(), stats.data_ptr(),
    )  # fmt: skip
    emulator(problem, seed)
    assert (arrived == 0).all(), "the counters must be ready for the next launch"
    return stats


def aligned_call(dtype: torch.dtype, grads: bool) -> WeightCall:
    """Rows and columns that can be read 16 bytes at a time; more than one chunk a head."""
    torch.manual_seed(0)
    weights = [torch.randn(2 * 80, 512).to(dtype), torch.randn(600, 3 * 80).to(dtype)]
    slices = [HeadSlices.contiguous(weights[0], 2, 80), HeadSlices.contiguous(weights[1], 3, 80, dim=1)]
    return WeightCall.of(slices, [torch.randn(w.shape).to(dtype) for w in weights] if grads else [])


@pytest.mark.parametrize(("dtype", "grads"), [(torch.float32, True), (torch.float16, False), (torch.bfloat16, True)])
def test_the_kernel_s_arithmetic_is_as_exact_as_pytorch(emulator, dtype, grads):
    for call in (weight_call(dtype, grads, most_spans=2), aligned_call(dtype, grads)):
        assert_exact(emulated(emulator, call, seed=1), call)


def test_the_order_of_the_blocks_changes_nothing(emulator):
    call = aligned_call(torch.bfloat16, True)
    assert torch.equal(emulated(emulator, call, seed=1), emulated(emulator, call, seed=7))


def test_nan_reaches_every_statistic_of_its_head_alone(emulator):
    weight = torch.ones(4, 64)
    weight[3, 5] = float("nan")
    found = emulated(emulator, WeightCall.of([HeadSlices.contiguous(weight, 2, 2)], []), seed=1)
    assert found.isnan().tolist() == [[False, True]] * 3


def test_other_devices_and_fp64_are_refused_with_a_reason():
    assert "cpu tensor" in cuda_weights.refuses(weight_call(torch.float32, False))
    assert cuda_weights.slower(weight_call(torch.float32, False)) is not None


gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or cuda.missing() is not None, reason="needs a CUDA device and the CUDA extension"
)


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("grads", [False, True])
@pytest.mark.parametrize("dtype", ELEMENTS)
def test_every_layout_on_a_gpu_is_as_exact_as_pytorch(dtype, grads):
    call = weight_call(dtype, grads, "cuda")
    first = cuda_weights.head_weight_stats(call)
    assert_exact(first, call)
    assert all(torch.equal(cuda_weights.head_weight_stats(call), first) for _ in range(10))


@pytest.mark.gpu
@gpu
def test_it_replays_in_a_cuda_graph_with_other_weights():
    check_graph_replay("cuda")
