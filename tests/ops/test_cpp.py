"""The C++ kernels against the reference in fp64."""

import os
import subprocess
import sys
from dataclasses import replace
from itertools import combinations

import pytest
import torch
from attention_calls import EPSILON, OPTIONS, Shape, in_fp64, make_call
from child_process import environment
from hypothesis import given, settings
from hypothesis import strategies as st

from headprune import HeadMap
from headprune.ops import attention, backend, reference
from headprune.ops.call import AttentionCall, operands
from headprune.ops.cpp import attention_forward, missing, refuses
from headprune.ops.extension import cpu_extension

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))


def assert_matches_reference(call: AttentionCall) -> None:
    output, lse, packed = attention_forward(call)
    exact, exact_lse, exact_packed = reference.attention_forward(in_fp64(call))
    same, _, _ = reference.attention_forward(call)
    assert output.shape == exact.shape
    assert output.dtype == call.query.dtype
    assert output.transpose(1, 2).is_contiguous()
    assert output.isfinite().all()
    error = (output.double() - exact).abs()
    allowed = 2 * (same.double() - exact).abs().amax() if error.numel() else 0
    floor = EPSILON[call.query.dtype] * max(exact.abs().amax().item(), 1.0) if error.numel() else 0
    assert (error <= allowed + 3 * floor).all(), f"{error.max()} > 2 x {allowed / 2} + {3 * floor}"
    active = torch.ones_like(lse, dtype=torch.bool) if call.gate is None else (reference.per_sample(call.gate) != 0)[..., None]
    active = active.expand_as(lse)
    torch.testing.assert_close(lse[active].double(), exact_lse[active], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(packed, exact_packed, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("layout", ["heads", "tokens", "columns"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_option_alone_matches_the_reference(dtype, layout):
    for option in OPTIONS:
        assert_matches_reference(make_call(Shape(), (option,), dtype, layout))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_few_rows_over_several_blocks_of_keys_match_the_reference(dtype):
    for options in [(), *((option,) for option in OPTIONS), *combinations(("bias", "sinks", "causal", "stats", "key_mask"), 3)]:
        assert_matches_reference(make_call(Shape(query_len=2, kv_len=1300), options, dtype))


def test_every_pair_of_options_matches_the_reference():
    shape = Shape(query_len=11, kv_len=19)
    for pair in combinations(OPTIONS, 2):
        assert_matches_reference(make_call(shape, pair))


@pytest.mark.parametrize(
    "shape",
    [
        Shape(groups=(1,) * 131, batch=1, query_len=5, kv_len=7),
        Shape(groups=(17, 1, 4), query_len=23, kv_len=140),
        Shape(groups=(1,), batch=1, query_len=1, kv_len=1, head_dim=1, value_dim=1),
        Shape(groups=(3, 0, 2)),
        Shape(groups=()),
        Shape(batch=0),
        Shape(query_len=0),
        Shape(kv_len=0),
        Shape(query_len=0, kv_len=0),
        Shape(head_dim=0),
        Shape(value_dim=0),
        Shape(groups=(2, 1), query_len=197, kv_len=197, head_dim=64, value_dim=64),
        Shape(groups=(4, 3), batch=1, query_len=130, kv_len=300, head_dim=128, value_dim=128),
        Shape(groups=(1,), batch=1, query_len=3, kv_len=517, head_dim=256, value_dim=40),
        Shape(groups=(4, 1), batch=1, query_len=50, kv_len=33, head_dim=7, value_dim=3),
    ],
    ids=str,
)
def test_shapes_at_the_edge_match_the_reference(shape):
    for options in [("stats",), ("key_mask", "stats", "sinks"), ("bool_bias", "gate"), ("alibi", "window", "stats")]:
        assert_matches_reference(make_call(shape, options))
    if shape.query_len <= shape.kv_len:
        assert_matches_reference(make_call(shape, ("causal", "stats")))
        assert_matches_reference(make_call(shape, ("causal", "window", "padding")))


@st.composite
def calls(draw) -> AttentionCall:
    kv_len = draw(st.integers(0, 150))
    options = tuple(draw(st.sets(st.sampled_from(OPTIONS), max_size=5)))
    shape = Shape(
        groups=tuple(draw(st.lists(st.integers(0, 6), max_size=4))),
        batch=draw(st.integers(0, 3)),
        query_len=draw(st.integers(0, kv_len if "causal" in options else 90)),
        kv_len=kv_len,
        head_dim=draw(st.integers(1, 70)),
        value_dim=draw(st.integers(1, 70)),
    )
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    return make_call(shape, options, dtype, draw(st.sampled_from(["heads", "tokens", "columns"])), draw(st.integers(0, 1000)))


@settings(max_examples=120, deadline=None, derandomize=True)
@given(calls())
def test_random_calls_match_the_reference(call):
    assert_matches_reference(call)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("mask", ["key_mask", "bool_bias", "bias"])
@pytest.mark.parametrize(
    ("queries", "keys", "options", "dtype"),
    [
        (40, 300, ("stats",), torch.float32),
        (3, 37, (), torch.bfloat16),
        (40, 301, ("window",), torch.bfloat16),
        (2, 1100, ("stats",), torch.float32),
    ],
)
def test_masked_keys_and_values_may_hold_anything(mask, poison, queries, keys, options, dtype):
    call = make_call(Shape(groups=(2, 1), query_len=queries, kv_len=keys), options, dtype)
    hidden = torch.rand(2, keys, generator=torch.Generator().manual_seed(1)) < 0.4
    hidden[:, 2 * keys // 3 :] = True
    added = torch.zeros(2, 1, 1, keys).masked_fill(hidden[:, None, None], float("-inf"))
    call = replace(
        call, **{"key_mask": {"key_mask": ~hidden}, "bool_bias": {"bias": ~hidden[:, None, None]}, "bias": {"bias": added}}[mask]
    )
    clean = attention_forward(call)
    where = hidden[:, None, :, None]
    dirty = attention_forward(replace(call, key=call.key.masked_fill(where, poison), value=call.value.masked_fill(where, poison)))
    for one, other in zip(clean, dirty):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("queries", [3, 40])
@pytest.mark.parametrize("options", [("causal",), ("window",), ("causal", "window", "alibi")])
def test_keys_that_a_bias_and_the_positions_hide_between_them_may_hold_anything(options, queries, dtype):
    call = make_call(Shape(query_len=queries, kv_len=60), options, dtype)
    allowed = reference.visible(call).clone()
    allowed[..., :9, 60 - queries] = False  # the window hides it from the others
    allowed[..., -1, 59] = False  # causality hides it from the others
    call = replace(call, bias=torch.where(allowed | ~reference.visible(call), 0.0, float("-inf")))
    hidden = ~reference.visible(call).any(dim=2)[:, [0, 2, 3], :, None]
    assert hidden.any()
    dirty = replace(call, key=call.key.masked_fill(hidden, float("nan")), value=call.value.masked_fill(hidden, float("inf")))
    for one, other in zip(attention_forward(call), attention_forward(dirty)):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("queries", [5, 40, 200])
def test_sums_over_many_keys_keep_their_digits(queries, dtype):
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 1, length, 8).to(dtype) for length in (queries, 20_000, 20_000))
    call = AttentionCall(query, key, value + 1, HeadMap.uniform(1), False, 0, 8**-0.5, 0.0, *[None] * 6, False)
    output, lse, _ = attention_forward(call)
    exact, exact_lse, _ = reference.attention_forward(in_fp64(call))
    assert (lse.double() - exact_lse).abs().max() < 2e-6
    if dtype == torch.float32:
        assert (output.double() - exact).abs().max() < 3e-6


@pytest.mark.parametrize("queries", [3, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_lowest_number_as_a_bias_is_no_minus_infinity(dtype, queries):
    call = make_call(Shape(query_len=queries, kv_len=50), (), dtype)
    bias = torch.zeros(2, 1, queries, 50, dtype=dtype)
    bias[:, :, :, 20:] = bias[0, :, 1] = torch.finfo(dtype).min
    output, _, _ = attention_forward(replace(call, bias=bias))
    everywhere = call.value.double().mean(dim=2)[0, list(call.head_map.kv_of_query)]
    assert (output[0, :, 1].double() - everywhere).abs().max() < 4 * EPSILON[dtype]
    within = replace(call, key=call.key[:, :, :20], value=call.value[:, :, :20])
    torch.testing.assert_close(output[1], attention_forward(within)[0][1], rtol=1e-6, atol=EPSILON[dtype])


def test_the_longest_window_hides_nothing():
    call = make_call(Shape(), ("causal", "stats"))
    for one, other in zip(attention_forward(call), attention_forward(replace(call, window=2**63 - 1))):
        assert torch.equal(one, other)


def test_fully_masked_rows_give_zero_and_lse_minus_infinity():
    call = make_call(Shape(), ("stats",))
    call = replace(call, key_mask=torch.zeros(2, 37, dtype=torch.bool))
    output, lse, packed = attention_forward(call)
    assert (output == 0).all()
    assert (lse == float("-inf")).all()
    assert (packed[[0, 1, 3, 4, 5]] == 0).all()
    assert (packed[2] == float("-inf")).all()


def test_large_scores_do_not_overflow():
    call = make_call(Shape(), ("stats",))
    assert_matches_reference(replace(call, query=call.query * 40, key=call.key * 40))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("length", "dim", "causal"), [(64, 32, False), (200, 64, False), (256, 128, True)])
def test_error_is_at_most_twice_that_of_torch_sdpa(dtype, length, dim, causal):
    call = make_call(Shape(groups=(1, 1, 1), batch=1, query_len=length, kv_len=length, head_dim=dim, value_dim=dim), (), dtype)
    call = replace(call, causal=causal)
    exact = reference.attention_forward(in_fp64(call))[0]
    ours = (attention_forward(call)[0].double() - exact).abs()
    torchs = (
        torch.nn.functional.scaled_dot_product_attention(call.query, call.key, call.value, is_causal=causal).double() - exact
    ).abs()
    assert ours.max() <= 2 * torchs.max() + 1e-7
    assert ours.mean() <= 2 * torchs.mean() + 1e-8


def test_results_do_not_depend_on_the_number_of_threads():
    call = make_call(Shape(groups=(3, 2), query_len=150, kv_len=700), ("causal", "stats", "sinks"))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = attention_forward(call)
        torch.set_num_threads(2)
        two = attention_forward(call)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(one, two))


AFTER_A_FAILURE = """
import resource, torch
from headprune import ops
torch.set_num_threads(1)
small, large = torch.randn(1, 1, 4, 64), torch.randn(1, 1, 1, 2_000_000)
before = ops.attention(small, small, small)
taken = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmSize"))
resource.setrlimit(resource.RLIMIT_AS, (taken * 1024 + 2**30,) * 2)
try:
    ops.attention(large, large, large)
except MemoryError:
    print(torch.equal(ops.attention(small, small, small), before))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux") or "LD_PRELOAD" in os.environ, reason="needs /proc, and malloc itself")
def test_the_next_call_after_memory_ran_out_computes():
    done = subprocess.run([sys.executable, "-c", AFTER_A_FAILURE], capture_output=True, text=True, env=environment())
    assert done.stdout.strip() == "True", done.stderr


def test_an_integer_call_is_refused_with_a_reason():
    call = make_call(Shape())
    assert "int64" in refuses(replace(call, query=call.query.long()))


def test_public_operator_runs_through_cpp_and_passes_opcheck():
    call = make_call(Shape(), ("bias", "sinks", "padding", "gate", "stats"))
    with backend("cpp"):
        assert torch.equal(torch.ops.headprune.attention(*operands(call))[0], attention_forward(call)[0])
    query = call.query.requires_grad_()
    torch.library.opcheck(torch.ops.headprune.attention.default, operands(replace(call, query=query, stats=False)))


def test_compiled_graph_gives_what_eager_gives():
    call = make_call(Shape())

    def run(query, key, value):
        return attention(query, key, value, call.head_map, causal=True) * 2

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(call.query, call.key, call.value), run(call.query, call.key, call.value))


@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_each_instruction_set_loads_and_matches_the_reference(capability):
    if capability not in ("default", torch.backends.cpu.get_cpu_capability().lower(), "avx2"):
        pytest.skip(f"this processor lacks {capability}")
    program = (
        "from headprune.ops.extension import cpu_extension; import test_cpp as t; print(cpu_extension().instruction_set)\n"
        "for options in [(), ('causal', 'alibi', 'stats'), ('bias', 'softcap'), ('key_mask', 'sinks', 'stats')]:\n"
        "    for dtype in t.EPSILON: t.assert_matches_reference(t.make_call(t.Shape(query_len=50, kv_len=150), options, dtype))\n"
        "    t.assert_matches_reference(t.make_call(t.Shape(query_len=1, kv_len=1100), options))\n"
    )
    here = os.path.dirname(__file__)
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability, "PYTHONPATH": f"{here}{os.pathsep}{os.path.dirname(here)}"}
    found = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr[-2000:]
    assert found.stdout.split() == [capability]


def test_missing_library_is_reported_with_the_way_out(tmp_path):
    found = cpu_extension(tmp_path)
    assert found.path is None
    assert "install from the source archive, with a C++ compiler" in found.reason


def test_library_that_does_not_load_is_reported(tmp_path):
    (tmp_path / "_cpu_default.so").write_bytes(b"not a library")
    found = cpu_extension(tmp_path)
    assert found.path is None
    assert "_cpu_default.so does not load" in found.reason
