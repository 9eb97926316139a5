"""The CUDA decode kernel against the reference in fp64: on the CPU through an emulated warp, and on a GPU where there is one."""

import ctypes
import os
import platform
import shutil
import subprocess
import sys
from ctypes import POINTER, Structure, c_float, c_int, c_int64, c_uint, c_void_p
from pathlib import Path

import pytest
import torch
from decode_cases import CASES, RAGGED, UNEQUAL, Case, assert_exact, build

from headprune import ops
from headprune.kernels.decode_plan import tile_table
from headprune.ops import cuda
from headprune.ops.call import DecodeCall

ROOT = Path(__file__).parents[2]
DTYPES = [torch.float16, torch.bfloat16]
WIDE_HEADS = CASES["wide heads by token"]
SUPPORTED = CASES | {"128 wide": Case(RAGGED, (300, 17), dim=128, value_dim=128, page_size=48, splits=2)}


class Operand(Structure):
    _fields_ = [("data", c_void_p), ("batch", c_int64), ("head", c_int64), ("token", c_int64)]

    @classmethod
    def of(cls, tensor):
        return cls(tensor.data_ptr(), *tensor.stride()[:3])


class Problem(Structure):
    """DecodeProblem of csrc/cuda/decode.h."""

    _fields_ = [
        *((name, c_int) for name in ("type", "batch", "query_heads", "tokens", "head_dim", "capacity", "window", "page_size")),
        *((name, c_float) for name in ("scale", "softcap")),
        *((name, Operand) for name in ("query", "key", "value", "output")),
        *((name, c_void_p) for name in ("lengths", "page_table")), ("page_table_batch", c_int64), ("tiles", c_void_p),
        *((name, c_int) for name in ("tile_count", "splits")), *((name, c_void_p) for name in ("alibi_slopes", "sinks", "gate")),
        ("gate_batch", c_int64), ("key_mask", c_void_p), ("key_mask_batch", c_int64),
        *((name, c_void_p) for name in ("partial", "partial_lse", "arrived")),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def emulator(tmp_path_factory):
    """`emulate_decode(problem, seed)`, the kernel's own source compiled for the CPU."""
    if platform.machine() != "x86_64" or not shutil.which("g++"):
        pytest.skip("the emulated warp needs g++ and an x86-64 processor")
    library = tmp_path_factory.mktemp("emulator") / "emulate.so"
    flags = ["-O1", "-std=c++20", "-mf16c", "-shared", "-fPIC", "-Wno-unknown-pragmas", f"-I{ROOT / 'csrc/cuda'}"]
    subprocess.run(["g++", *flags, str(ROOT / "tests/ops/emulate_decode.cpp"), "-o", str(library)], check=True)
    loaded = ctypes.CDLL(str(library))
    assert loaded.problem_size() == ctypes.sizeof(Problem)
    loaded.emulate_decode.argtypes = [POINTER(Problem), c_uint]
    return loaded.emulate_decode


def emulated(emulator, call: DecodeCall, splits: int, seed: int) -> torch.Tensor:
    """What the kernel writes, its blocks running one after another in an order that `seed` decides."""
    heads, new, batch, dim = call.query_heads, call.new, call.batch, call.query.shape[3]
    tiles = tile_table(call.head_map.group_offsets, new, 16, torch.device("cpu"))
    output = call.empty_output().fill_(float("nan"))
    partial = torch.full((batch * heads * new * splits, dim + 1), float("nan"))
    arrived = torch.zeros(batch * tiles.shape[0], dtype=torch.int32)
    address = lambda tensor: None if tensor is None else tensor.data_ptr()  # noqa: E731
    stride = lambda tensor: tensor.stride(0) if tensor is not None and tensor.dim() == 2 else 0  # noqa: E731
    problem = Problem(
        DTYPES.index(call.query.dtype), batch, heads, new, dim, call.capacity, call.window,
        call.key_cache.shape[2] if call.page_table is not None else 0, call.scale, call.softcap,
        Operand.of(call.query), Operand.of(call.key_cache), Operand.of(call.value_cache), Operand.of(output),
        address(call.lengths), address(call.page_table), stride(call.page_table), address(tiles), tiles.shape[0], splits,
        address(call.alibi_slopes), address(call.sinks), address(call.gate), stride(call.gate), address(call.key_mask),
        stride(call.key_mask), address(partial), partial.data_ptr() + 4 * dim * len(partial), address(arrived),
    )  # fmt: skip
    emulator(problem, seed)
    assert (arrived == 0).all(), "the counters must be ready for the next launch"
    return output


@pytest.mark.parametrize("name", SUPPORTED)
def test_the_kernel_s_arithmetic_is_as_exact_as_pytorch(emulator, name):
    case = SUPPORTED[name]
    built = build(case, torch.float16)
    assert_exact(emulated(emulator, built.call, case.splits or 1, seed=1), built.call, built.clean, name)


def test_bf16_is_as_exact_and_the_order_of_the_blocks_changes_nothing(emulator):
    built = build(CASES["ragged, lengths 0 and 1"], torch.bfloat16)
    first = emulated(emulator, built.call, splits=3, seed=1)
    assert_exact(first, built.call, built.clean, "bf16")
    assert torch.equal(first, emulated(emulator, built.call, splits=3, seed=7))


@pytest.mark.parametrize(
    ("case", "dtype", "names"),
    [(UNEQUAL["head_dim 80, value_dim 24"], torch.float16, "head_dim 80"), (CASES["one head"], torch.float32, "torch.float32")],
)
def test_what_the_kernel_cannot_take_is_refused_with_a_reason(case, dtype, names):
    assert names in cuda.refuses_tensors(build(case, dtype).call)


def test_rows_that_are_not_16_byte_aligned_are_refused():
    call = build(WIDE_HEADS, torch.float16).call
    wide = torch.zeros(*call.key_cache.shape[:3], 100, dtype=torch.float16)
    for name, crooked in (
        ("strides", wide[..., :96]),
        ("start", wide.flatten()[4:].as_strided(call.key_cache.shape, (0, 0, 8, 1))),
    ):
        changed = DecodeCall(**{**vars(call), "key_cache": crooked})
        assert "16-byte" in cuda.refuses_tensors(changed), name
    assert cuda.refuses_tensors(call) is None


gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or cuda.missing() is not None, reason="needs a CUDA device and the CUDA extension"
)


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SUPPORTED)
def test_decode_on_a_gpu_is_as_exact_as_pytorch(name, dtype):
    case = SUPPORTED[name]
    built = build(case, dtype, "cuda")
    for splits in {case.splits or 1, 1, 5}:
        assert_exact(cuda.attention_decode(built.call, splits), built.call, built.clean, f"{name}, {splits} splits")


@pytest.mark.gpu
@gpu
def test_repeated_calls_give_the_same_bits_and_leave_the_counters_ready():
    call = build(Case(RAGGED, (5000, 4097, 3), dim=128, value_dim=128), torch.bfloat16, "cuda").call
    first = cuda.attention_decode(call, 16)
    assert all(torch.equal(cuda.attention_decode(call, 16), first) for _ in range(20))


@pytest.mark.gpu
@gpu
def test_decode_replays_in_a_cuda_graph_with_other_lengths():
    call = build(CASES["ragged, lengths 0 and 1"], torch.float16, "cuda").clean
    run = lambda: ops.attention_decode(call.query, call.key_cache, call.value_cache, call.lengths, RAGGED)  # noqa: E731
    with ops.backend("cuda"):
        run()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = run()
        for lengths in ([3, 100, 513, 0], [513, 0, 1, 77]):
            call.lengths.copy_(torch.tensor(lengths))
            graph.replay()
            assert torch.equal(output, run())


SANITIZED = """
import torch
from decode_cases import CASES, build
from headprune.ops import cuda
assert cuda.missing() is None, cuda.missing()
for name in ("ragged, lengths 0 and 1", "pages of 16", "every option", "wide heads by token"):
    assert cuda.attention_decode(build(CASES[name], torch.float16, "cuda").call, 2).isfinite().all()
"""


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("check", ["memcheck", "racecheck"])
def test_compute_sanitizer_finds_nothing(check):
    tool = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if tool is None:
        pytest.skip("compute-sanitizer is not installed")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    command = [tool, "--tool", check, "--error-exitcode", "9", sys.executable, "-c", SANITIZED]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
