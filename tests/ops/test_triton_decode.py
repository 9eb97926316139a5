"""The Triton decode kernel against the reference in fp64: in Triton's interpreter, and on a GPU where there is one."""

import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from decode_cases import CASES, RAGGED, UNEQUAL, Case, assert_exact, build, grouped

from headprune import ops
from headprune.ops import reference, triton_decode
from headprune.ops.backend import choose
from headprune.ops.call import AttentionCall, operands

TESTS = Path(__file__).parents[1]


def check(name: str, case: Case, device: str, dtype: torch.dtype) -> None:
    from headprune.kernels.attention_decode import attention_decode

    built = build(case, dtype, device)
    call = built.call
    assert triton_decode.refuses(call) is None
    output, lse = call.empty_output().fill_(float("nan")), call.query.new_empty(call.query.shape[:3], dtype=torch.float32)
    options = {
        field: getattr(call, field)
        for field in ("lengths", "page_table", "window", "scale", "softcap", "alibi_slopes", "sinks", "key_mask", "gate")
    }
    tensors = (call.query, call.key_cache, call.value_cache, output, lse, call.head_map.group_offsets)
    attention_decode(*tensors, splits=case.splits, **options)
    assert_exact(output, call, built.clean, name)


def few_queries(device: str, dtype: torch.dtype, causal: bool, query_len: int) -> AttentionCall:
    """An attention of a few queries on many keys, one head gated off."""
    torch.manual_seed(0)
    rows = lambda heads, length: torch.randn(2, heads, length, 32, device=device, dtype=dtype)  # noqa: E731
    options = {"alibi_slopes": torch.rand(7, device=device) / 9, "sinks": torch.randn(7, device=device)}
    key_mask = torch.rand(2, 600, device=device) > 0.3
    gate = torch.tensor([1.0, 0.0, 2, 1, 1, 1, 1], device=device)
    call = (rows(7, query_len), rows(3, 600), rows(3, 600), RAGGED, causal, 400, 0.2, 3.0)
    return AttentionCall(*call, None, options["alibi_slopes"], options["sinks"], key_mask, None, gate, False)


def check_attention(device: str, dtype: torch.dtype) -> None:
    for causal, query_len in ((False, 1), (True, 3)):
        call = few_queries(device, dtype, causal, query_len)
        with ops.backend("triton-decode"):
            chosen = choose("attention", call)
        assert chosen.run is triton_decode.attention_forward
        output, lse, _ = chosen.run(call)
        same, exact_lse, _ = reference.attention_forward(call)
        doubles = {name: getattr(call, name).double() for name in ("query", "key", "value")}
        exact, _, _ = reference.attention_forward(replace(call, **doubles))
        unit = torch.finfo(dtype).eps * exact.abs().max()
        assert (output - exact).abs().max() <= 2 * (same - exact).abs().max() + unit
        computed = call.gate != 0
        torch.testing.assert_close(lse[:, computed], exact_lse[:, computed], rtol=1e-4, atol=1e-4)
        assert (lse[:, ~computed] == float("-inf")).all()


def check_far_heads() -> None:
    """Queries that are more than 2^31 elements apart, as the last ones of long prompts may be, in a file of holes."""
    call = build(Case(grouped(2, 1), (40,)), torch.float16).call
    with tempfile.TemporaryDirectory() as folder:
        file = torch.from_file(f"{folder}/far", shared=True, size=5 * 2**29, dtype=torch.float16)
        far = file.as_strided(call.query.shape, (1, 5 * 2**28 - 64, 1, 1))
        far.copy_(call.query)
        with ops.backend("triton"):
            arguments = (call.key_cache, call.value_cache, call.lengths, call.head_map)
            assert torch.equal(ops.attention_decode(far, *arguments), ops.attention_decode(call.query, *arguments))


def check_gradient(device: str) -> None:
    """The attention operator stays differentiable when the decode kernel computes it."""
    call = few_queries(device, torch.float32, True, 3)
    leaves = [tensor.requires_grad_() for tensor in (call.query, call.key, call.value)]
    weight = torch.randn_like(call.query)
    with ops.backend("triton-decode"):
        output = torch.ops.headprune.attention(*operands(call))[0]
    found = torch.autograd.grad((output * weight).sum(), leaves)
    exact = torch.autograd.grad((reference.attention_forward(call)[0] * weight).sum(), leaves)
    for ours, theirs in zip(found, exact):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


INTERPRETED = """
import torch, test_triton_decode as t
for name, case in (t.CASES | t.UNEQUAL).items():
    t.check(name, case, "cpu", torch.float32)
for name in ("pages of 16", "every option"):
    t.check(name, t.CASES[name], "cpu", torch.float16)
t.check_attention("cpu", torch.float32)
t.check_gradient("cpu")
t.check("window beyond all keys", t.Case(t.RAGGED, (1, 70), new=8, window=2**31 - 1), "cpu", torch.float32)
t.check_far_heads()
print("done")
"""


def test_decode_in_the_interpreter_is_as_exact_as_pytorch():
    """In a process of its own: the variable must be set before triton is imported."""
    pytest.importorskip("triton", reason="Triton is not installed")
    path = os.pathsep.join([str(TESTS), str(TESTS / "ops"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "done", done.stderr


def test_a_cache_that_cannot_be_read_by_rows_is_refused_not_copied():
    call = build(CASES["one head"], torch.float32).call
    crooked = call.key_cache.transpose(2, 3).contiguous().transpose(2, 3)
    assert "last stride of the key cache is 1007" in triton_decode.strided("key", crooked)


@pytest.mark.parametrize(
    ("change", "names"), [({"query_len": 9, "causal": True}, "up to 8 queries"), ({"query_len": 2, "causal": False}, "causal")]
)
def test_attention_is_not_taken_for_decode_where_it_is_not(change, names):
    assert names in triton_decode.refuses_attention(few_queries("cpu", torch.float32, **change))


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES | UNEQUAL)
def test_decode_on_a_gpu_is_as_exact_as_pytorch(name, dtype):
    check(name, (CASES | UNEQUAL)[name], "cuda", dtype)


@pytest.mark.gpu
@gpu
def test_attention_of_a_few_queries_runs_as_decode_on_a_gpu():
    check_attention("cuda", torch.float32)
    check_gradient("cuda")


@pytest.mark.gpu
@gpu
def test_a_long_cache_is_addressed_beyond_32_bits():
    """More than 2^32 elements lie before the last samples' keys."""
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GB of free memory")
    case = Case(RAGGED, (2**17,) * 2, dim=128, value_dim=128)
    call = build(case, torch.float16, "cuda").call
    wide = torch.zeros(90, *call.key_cache.shape[1:], device="cuda", dtype=torch.float16)
    assert wide.numel() > 2**32
    wide[-2:] = call.key_cache
    query = torch.zeros(90, *call.query.shape[1:], device="cuda", dtype=torch.float16)
    query[-2:] = call.query
    lengths = torch.full((90,), 2**17, dtype=torch.int32, device="cuda")
    with ops.backend("triton"):
        found = ops.attention_decode(query, wide, wide, lengths, RAGGED)[-2:]
        assert torch.allclose(found, ops.attention_decode(query[-2:], wide[-2:], wide[-2:], lengths[-2:], RAGGED), atol=1e-3)


@pytest.mark.gpu
@gpu
def test_decode_replays_in_a_cuda_graph_with_other_lengths():
    built = build(CASES["ragged, lengths 0 and 1"], torch.float16, "cuda")
    call = built.clean
    run = lambda: ops.attention_decode(call.query, call.key_cache, call.value_cache, call.lengths, RAGGED)  # noqa: E731
    with ops.backend("triton"):
        run()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = run()
        call.lengths.copy_(torch.tensor([3, 100, 513, 0]))
        graph.replay()
        assert torch.equal(output, run())
