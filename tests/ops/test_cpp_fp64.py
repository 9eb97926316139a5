"""The C++ kernels in fp64: equal to the reference, and gradients by finite differences through them and the reference."""

from dataclasses import replace

import decode_cases
import pytest
import torch
from attention_calls import OPTIONS, Shape, in_fp64, make_call
from torch.autograd import gradcheck

from headprune import HeadMap, ops
from headprune.ops import reference
from headprune.ops.cpp import attention_backward, attention_decode, attention_forward, missing

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))
EXTRAS = ("bias", "alibi_slopes", "sinks", "gate")
LEAVES = ("query", "key", "value", "bias", "sinks", "gate")


def doubled(shape: Shape, options: tuple[str, ...], layout: str = "heads"):
    call = in_fp64(make_call(shape, options, torch.float64, layout))
    extras = {name: getattr(call, name) for name in EXTRAS}
    return replace(call, **{name: x.double() for name, x in extras.items() if x is not None and x.dtype != torch.bool})


@pytest.mark.parametrize("options", [(), *((option,) for option in OPTIONS), OPTIONS[:4], ("causal", "sinks", "padding", "stats")])
def test_every_option_equals_the_reference(options):
    for shape in (Shape(), Shape(groups=(9, 1), batch=1, query_len=2, kv_len=1100, head_dim=35)):
        call = doubled(shape, options, "columns")
        output, lse, stats = attention_forward(call)
        exact, exact_lse, exact_stats = reference.attention_forward(call)
        active = torch.ones_like(lse) if call.gate is None else (reference.per_sample(call.gate) != 0)[..., None].expand_as(lse)
        torch.testing.assert_close(output, exact, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(lse[active.bool()], exact_lse[active.bool()], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(stats, exact_stats, rtol=1e-6, atol=1e-6)
        needs = tuple((leaf := getattr(call, name)) is not None and leaf.dtype != torch.bool for name in LEAVES)
        grad = torch.randn_like(output)
        right = reference.attention_backward(call, grad, needs)
        for ours, other in zip(attention_backward(call, grad, output, lse, needs), right):
            assert (ours is None) == (other is None)
            if ours is not None:
                torch.testing.assert_close(ours, other, rtol=1e-10, atol=1e-11)


def test_what_a_large_sink_leaves_keeps_its_digits():
    shape = Shape(groups=(2, 1), query_len=2, kv_len=1100)
    call = doubled(shape, ("sinks",))
    call = replace(call, sinks=torch.full((3,), 150.0).double(), key=call.key * torch.linspace(1, 30, 1100)[:, None])
    output, _, _ = attention_forward(call)
    torch.testing.assert_close(output, reference.attention_forward(call)[0], rtol=1e-11, atol=0)


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize(
    "options", [("causal", "softcap", "gate"), ("bias", "sinks", "sample_gate"), ("window", "alibi", "key_mask")]
)
def test_gradcheck(backend, options):
    call = doubled(Shape(groups=(2, 1), batch=2, query_len=3, kv_len=4, head_dim=3, value_dim=2), options)
    leaves = {name: getattr(call, name) for name in LEAVES if getattr(call, name) is not None}
    settings = {name: getattr(call, name) for name in ("causal", "window", "softcap", "alibi_slopes", "key_mask")}

    def run(*tensors):
        given = dict(zip(leaves, tensors))
        return ops.attention(*(given.pop(name) for name in LEAVES[:3]), call.head_map, **given, **settings)

    with ops.backend(backend):
        assert gradcheck(run, tuple(leaf.clone().requires_grad_() for leaf in leaves.values()))


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_gradcheck_of_packed_sequences(backend):
    torch.manual_seed(0)
    starts_q, starts_k = (torch.tensor(x, dtype=torch.int32) for x in ([0, 2, 2, 5], [0, 3, 4, 8]))
    leaves = [torch.randn(5, 3, 3), torch.randn(8, 2, 3), torch.randn(8, 2, 2), torch.randn(3), torch.randn(3, 3)]
    head_map = HeadMap((0, 0, 1), 2)

    def run(q, k, v, sinks, gate):
        return ops.attention_varlen(q, k, v, starts_q, starts_k, head_map, causal=True, sinks=sinks, gate=gate)

    with ops.backend(backend):
        assert gradcheck(run, tuple(leaf.double().requires_grad_() for leaf in leaves))


@pytest.mark.parametrize("name", [*decode_cases.CASES, *decode_cases.UNEQUAL])
def test_decode_equals_the_reference(name):
    built = decode_cases.build({**decode_cases.CASES, **decode_cases.UNEQUAL}[name], torch.float64)
    exact = reference.attention_decode(built.clean)
    torch.testing.assert_close(attention_decode(built.call), exact, rtol=1e-9, atol=1e-10)
