"""Gradients of the C++ kernels against the reference in fp64."""

from dataclasses import replace
from itertools import combinations

import pytest
import torch
from attention_calls import EPSILON, OPTIONS, Shape, in_fp64, make_call
from hypothesis import given, settings
from hypothesis import strategies as st

from headprune import HeadMap
from headprune.ops import attention, reference
from headprune.ops.call import AttentionCall
from headprune.ops.cpp import attention_backward, attention_forward, missing

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))
NAMES = ("query", "key", "value", "bias", "sinks", "gate")
BACKWARD_OPTIONS = tuple(name for name in OPTIONS if name not in ("stats", "query_mask"))


def possible(call: AttentionCall) -> tuple[bool, ...]:
    """Which gradients this call has."""
    return tuple((tensor := getattr(call, name)) is not None and tensor.dtype != torch.bool for name in NAMES)


def gradients(call: AttentionCall, needs=None, seed: int = 1) -> tuple[torch.Tensor, tuple[torch.Tensor | None, ...]]:
    """A random gradient of the output, and what C++ makes of it."""
    output, lse, _ = attention_forward(call)
    generator = torch.Generator().manual_seed(seed)
    grad_output = torch.randn(output.shape, generator=generator).to(output.dtype)
    return grad_output, attention_backward(call, grad_output, output, lse, needs or possible(call))


def assert_matches_reference(call: AttentionCall, also: float = 0.0) -> None:
    """`also`: a further error allowed, relative to the largest gradient."""
    grad_output, found = gradients(call)
    needs = possible(call)
    exact = reference.attention_backward(in_fp64(call), grad_output.double(), needs)
    same = reference.attention_backward(call, grad_output, needs)
    for name, need, ours, right, theirs in zip(NAMES, needs, found, exact, same):
        assert (ours is not None) == need, name
        if not need:
            continue
        tensor = getattr(call, name)
        assert ours.shape == tensor.shape, name
        assert ours.dtype == tensor.dtype, name
        assert ours.isfinite().all(), name
        if ours.numel():
            error = (ours.double() - right).abs().max()
            epsilon = EPSILON[call.query.dtype]
            allowed = 2 * (theirs.double() - right).abs().max() + 8 * epsilon * max(1, right.abs().max()) + also * right.abs().max()
            if name == "gate":
                # Sums over all of the output, which the forward has rounded to the dtype.
                allowed += epsilon * (call.query_len * call.value_dim) ** 0.5
            assert error <= allowed, f"{name}: {error} > {allowed}"


@pytest.mark.parametrize("layout", ["heads", "tokens", "columns"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_option_alone_gives_the_gradients_of_the_reference(dtype, layout):
    for option in BACKWARD_OPTIONS:
        assert_matches_reference(make_call(Shape(), (option,), dtype, layout))


def test_every_pair_of_options_gives_the_gradients_of_the_reference():
    shape = Shape(query_len=11, kv_len=19)
    for pair in combinations(BACKWARD_OPTIONS, 2):
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
        Shape(head_dim=0),
        Shape(value_dim=0),
        Shape(groups=(2, 1), batch=1, query_len=197, kv_len=197, head_dim=64, value_dim=64),
        Shape(groups=(4, 3), batch=1, query_len=130, kv_len=300, head_dim=128, value_dim=48),
        Shape(groups=(4, 1), batch=1, query_len=50, kv_len=33, head_dim=7, value_dim=3),
    ],
    ids=str,
)
def test_shapes_at_the_edge_give_the_gradients_of_the_reference(shape):
    for options in [(), ("key_mask", "sinks"), ("bias", "gate"), ("alibi", "window", "sample_gate")]:
        assert_matches_reference(make_call(shape, options))
    if shape.query_len <= shape.kv_len:
        assert_matches_reference(make_call(shape, ("causal",)))
        assert_matches_reference(make_call(shape, ("causal", "window", "padding", "softcap")))


@st.composite
def calls(draw) -> AttentionCall:
    kv_len = draw(st.integers(0, 300))
    options = tuple(draw(st.sets(st.sampled_from(BACKWARD_OPTIONS), max_size=4)))
    shape = Shape(
        groups=tuple(draw(st.lists(st.integers(0, 5), max_size=3))),
        batch=draw(st.integers(0, 3)),
        query_len=draw(st.integers(0, kv_len if "causal" in options else 90)),
        kv_len=kv_len,
        head_dim=draw(st.integers(1, 70)),
        value_dim=draw(st.integers(1, 70)),
    )
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    return make_call(shape, options, dtype, draw(st.sampled_from(["heads", "tokens", "columns"])), draw(st.integers(0, 1000)))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(calls())
def test_random_calls_give_the_gradients_of_the_reference(call):
    assert_matches_reference(call)


@pytest.mark.parametrize("broadcast", range(16))
def test_the_gradient_of_a_bias_is_summed_where_it_broadcasts(broadcast):
    full = (2, 6, 37, 150)
    shape = [1 if broadcast >> dim & 1 else size for dim, size in enumerate(full)]
    call = make_call(Shape(kv_len=150), ("padding", "sinks"))
    assert_matches_reference(replace(call, bias=torch.randn(shape, generator=torch.Generator().manual_seed(2))))


@pytest.mark.parametrize("bias", [torch.tensor(0.5), torch.linspace(-1, 1, 37), torch.linspace(-1, 1, 37, dtype=torch.bfloat16)])
def test_a_bias_with_fewer_dimensions_gets_a_gradient_of_its_shape_and_dtype(bias):
    assert_matches_reference(replace(make_call(Shape(), ("sinks",)), bias=bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gate", [0.0, 1e-30, 1e-3, -2.0])
def test_gates_of_any_size_get_their_gradient(gate, dtype):
    call = make_call(Shape(), ("causal", "sinks"), dtype)
    gates = torch.tensor([gate, 1.0, 0.0, gate, 0.5, 0.0])
    assert_matches_reference(replace(call, gate=gates))
    assert_matches_reference(replace(call, gate=torch.stack([gates, gates.flip(0)])))


def test_heads_gated_off_contribute_nothing_and_are_not_read():
    call = make_call(Shape(), ("gate",))
    silent = call.gate == 0
    poisoned = replace(call, query=call.query.masked_fill(silent[None, :, None, None], float("nan")))
    needs = (True, True, True, False, False, False)
    for clean, dirty in zip(gradients(call, needs)[1], gradients(poisoned, needs)[1]):
        assert clean is dirty or torch.equal(clean, dirty)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("mask", ["key_mask", "bool_bias", "bias"])
def test_masked_keys_and_values_may_hold_anything(mask, poison):
    call = make_call(Shape(groups=(2, 1), query_len=40, kv_len=300), ("softcap",))
    hidden = torch.rand(2, 300, generator=torch.Generator().manual_seed(1)) < 0.4
    hidden[:, 200:] = True
    added = torch.zeros(2, 1, 1, 300).masked_fill(hidden[:, None, None], float("-inf"))
    call = replace(
        call, **{"key_mask": {"key_mask": ~hidden}, "bool_bias": {"bias": ~hidden[:, None, None]}, "bias": {"bias": added}}[mask]
    )
    where = hidden[:, None, :, None]
    dirty = replace(call, key=call.key.masked_fill(where, poison), value=call.value.masked_fill(where, poison))
    for one, other in zip(gradients(call)[1], gradients(dirty)[1]):
        assert one is other or torch.equal(one, other)


def test_rows_that_attend_to_nothing_get_no_gradient():
    call = replace(make_call(Shape(), ("bias", "sinks", "gate")), key_mask=torch.zeros(2, 37, dtype=torch.bool))
    for grad in gradients(call)[1]:
        assert (grad == 0).all()


def test_large_scores_do_not_overflow():
    call = make_call(Shape())
    call = replace(call, query=call.query * 40, key=call.key * 40)
    # exp(score - lse) carries the rounding of lse, which is kept in fp32 between the passes.
    assert_matches_reference(call, also=4 * EPSILON[torch.float32] * attention_forward(call)[1].abs().max())


@pytest.mark.parametrize("needed", range(6))
def test_each_gradient_may_be_asked_for_alone(needed):
    call = make_call(Shape(), ("bias", "sinks", "gate"))
    everything = gradients(call)[1]
    alone = gradients(call, tuple(index == needed for index in range(6)))[1]
    for index, (one, other) in enumerate(zip(alone, everything)):
        assert one is None if index != needed else torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("length", "dim", "causal"), [(64, 32, False), (200, 64, False), (256, 128, True)])
def test_error_is_at_most_twice_that_of_torch_sdpa(dtype, length, dim, causal):
    shape = Shape(groups=(1, 1, 1), batch=1, query_len=length, kv_len=length, head_dim=dim, value_dim=dim)
    call = replace(make_call(shape, (), dtype), causal=causal)
    grad_output, found = gradients(call)
    exact = reference.attention_backward(in_fp64(call), grad_output.double(), possible(call))
    leaves = [tensor.clone().requires_grad_() for tensor in (call.query, call.key, call.value)]
    output = torch.nn.functional.scaled_dot_product_attention(*leaves, is_causal=causal)
    for ours, theirs, right in zip(found, torch.autograd.grad(output, leaves, grad_output), exact):
        assert (ours.double() - right).abs().max() <= 2 * (theirs.double() - right).abs().max() + 1e-7


@pytest.mark.parametrize("shape", [(7,), (1, 7), (0, 7), (1, 0, 7), (2, 6, 0, 7), (0, 1), (1,), ()], ids=str)
def test_the_gradient_of_a_bias_without_queries_has_its_shape(shape):
    call = replace(make_call(Shape(query_len=0, kv_len=7)), bias=torch.randn(shape))
    _, found = gradients(call)
    assert found[3].shape == call.bias.shape
    assert (found[3] == 0).all()


def test_probabilities_of_one_survive_the_lse():
    """Heads with one key, whose score is far from 0: its probability is exactly 1 in spite of the rounding of the lse."""
    call = make_call(Shape(groups=(1,) * 200, batch=1, query_len=1, kv_len=1, value_dim=1))
    scores = torch.linspace(100, 1000, 200)
    call = replace(call, bias=scores[None, :, None, None])
    output, lse, _ = attention_forward(call)
    probs = attention_backward(call, torch.ones_like(output), output, lse, (False, False, True, False, False, False))[2]
    assert ((probs.flatten() - 1).abs() / scores).mean() < 0.1 * 2.0**-24


def test_probabilities_of_huge_scores_do_not_exceed_one():
    call = make_call(Shape(groups=(1,), query_len=40, kv_len=3))
    call = replace(call, query=1e5 * call.query, key=1e5 * call.key)
    grad_output, found = gradients(call)
    assert found[2].abs().max() <= grad_output.abs().sum(dim=2).max()


@pytest.mark.parametrize("options", [("causal",), ("row_bias", "sinks"), ("window", "gate")])
def test_results_do_not_depend_on_the_number_of_threads(options):
    call = make_call(Shape(groups=(3, 2), batch=1, query_len=150, kv_len=600, head_dim=32), options)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = gradients(call)[1]
        torch.set_num_threads(4)
        runs = [gradients(call)[1] for _ in range(3)]
    finally:
        torch.set_num_threads(threads)
    for run in runs:
        assert all(a is b or torch.equal(a, b) for a, b in zip(one, run))


def test_autograd_reaches_the_kernels_through_the_public_operator():
    call = make_call(Shape(), ("causal", "gate"))
    grad_output, expected = gradients(call)
    leaves = [tensor.clone().requires_grad_() for tensor in (call.query, call.key, call.value, call.gate)]
    output = attention(*leaves[:3], call.head_map, causal=True, scale=call.scale, gate=leaves[3])
    for grad, other in zip(torch.autograd.grad(output, leaves, grad_output), [*expected[:3], expected[5]]):
        assert torch.equal(grad, other)


@pytest.mark.parametrize("layout", ["heads", "tokens"])
def test_gradients_lie_as_their_tensors_do(layout):
    call = make_call(Shape(), (), layout=layout)
    _, found = gradients(call)
    for name, grad in zip(NAMES[:3], found):
        assert grad.stride() == torch.empty_like(getattr(call, name)).stride(), name


def test_keys_that_no_query_sees_have_a_gradient_of_zero_in_memory_that_held_others():
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 3, length, 16) for length in (5, 400, 400))
    call = AttentionCall(query, key, value, HeadMap.uniform(3), True, 4, 0.25, 0.0, *[None] * 6, False)
    for _ in range(3):
        used = [torch.full_like(key, float("nan")) for _ in range(8)]
        del used
        _, (_, grad_key, grad_value, *_) = gradients(call)
        for grad in (grad_key, grad_value):
            assert (grad[:, :, :392] == 0).all()
            assert (grad[:, :, 392:] != 0).any(dim=-1).all()
