"""Operators called past the dispatcher: the same results, and whoever has to see an operator sees it."""

from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from torch.autograd.profiler import profile
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from headprune import HeadMap
from headprune.ops import attention, attention_decode, attention_varlen
from headprune.ops.backend import reference
from headprune.ops.call import AttentionCall, operands

MAP = HeadMap((0, 0, 1), 2)


def inputs(**options):
    return torch.randn(2, 3, 5, 8, **options), torch.randn(2, 2, 7, 8, **options), torch.randn(2, 2, 7, 8, **options)


def decode(query, key, value):
    lengths = torch.full((query.shape[0],), key.shape[2], dtype=torch.int32)
    return attention_decode(query, key, value, lengths, MAP)


def varlen(query, key, value):
    packed = [tensor.transpose(1, 2).flatten(0, 1) for tensor in (query, key, value)]
    starts = [torch.tensor([0, length, 2 * length], dtype=torch.int32) for length in (query.shape[2], key.shape[2])]
    return attention_varlen(*packed, *starts, MAP)


OPERATORS = {"attention": lambda *tensors: attention(*tensors, MAP), "attention_decode": decode, "attention_varlen": varlen}
each_operator = pytest.mark.parametrize("name", OPERATORS)


def operators_run(function) -> set[str]:
    """The operators of headprune that the dispatcher ran, by name."""
    with profile() as found:
        function()
    return {event.name.removeprefix("headprune::") for event in found.function_events if event.name.startswith("headprune::")}


@each_operator
@torch.no_grad()
def test_nothing_sees_a_plain_call(name):
    tensors = [torch.nn.Parameter(tensor) for tensor in inputs()]  # what asks for gradients does so only where they are recorded
    assert operators_run(lambda: OPERATORS[name](*tensors)) == set()
    with SeenFunctions():  # the dispatcher's calls are seen where there are some
        assert operators_run(lambda: OPERATORS[name](*tensors)) == {name}
    with torch.inference_mode():
        assert operators_run(lambda: OPERATORS[name](*inputs())) == set()


def call_of(query, key, value):
    scale = query.shape[3] ** -0.5
    return AttentionCall(query, key, value, MAP, False, 0, scale, 0.0, None, None, None, None, None, None, False)


def test_result_is_the_operators():
    query, key, value = inputs()
    extras = {"causal": True, "window": 3, "softcap": 5.0, "alibi_slopes": torch.rand(3), "sinks": torch.rand(3), "stats": True}
    call = replace(call_of(query, key, value), gate=torch.rand(2, 3), **extras)
    through, _, _ = torch.ops.headprune.attention(*operands(call))
    at_once, _ = attention(query, key, value, MAP, gate=call.gate, **extras)
    assert torch.equal(at_once, through)


class SeenOperators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))


class SeenFunctions(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name() if isinstance(function, torch._ops.OpOverload) else "")
        return function(*args, **(kwargs or {}))


@each_operator
@pytest.mark.parametrize("mode", [SeenOperators, SeenFunctions])
def test_modes_see_the_operator(name, mode):
    with mode() as seen:
        OPERATORS[name](*inputs())
    assert f"headprune::{name}" in seen.names


class Traced(torch.Tensor):
    """A subclass that sees what is done to it."""

    names: ClassVar[list[str]] = []

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if isinstance(function, torch._ops.OpOverload):
            cls.names.append(function.name())
        return super().__torch_function__(function, types, args, kwargs or {})


def test_subclasses_see_the_operator():
    query, key, value = inputs()
    assert isinstance(attention(query.as_subclass(Traced), key, value, MAP), Traced)
    assert Traced.names == ["headprune::attention"]


@each_operator
def test_autocast_casts(name):
    with torch.autocast("cpu", torch.bfloat16):
        assert OPERATORS[name](*inputs()).dtype == torch.bfloat16


@pytest.mark.parametrize("place", range(3))
def test_one_gradient_is_enough(place):
    tensors = list(inputs())
    tensors[place].requires_grad_()
    attention(*tensors, MAP).sum().backward()
    assert tensors[place].grad.abs().sum() > 0


def test_gradient_of_a_gate_alone():
    gate = torch.ones(3, requires_grad=True)
    attention(*inputs(), MAP, gate=gate).sum().backward()
    assert gate.grad.abs().min() > 0


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_traces_hold_the_operator():
    traced = torch.jit.trace(OPERATORS["attention"], inputs(), check_trace=False)
    assert "headprune::attention" in str(traced.graph)


@each_operator
def test_forward_derivatives(name):
    points, directions = inputs(dtype=torch.float64), inputs(dtype=torch.float64)
    result, derivative = torch.func.jvp(OPERATORS[name], points, directions)
    step = 1e-6
    ahead, behind = (OPERATORS[name](*(p + s * d for p, d in zip(points, directions))) for s in (step, -step))
    torch.testing.assert_close(result, OPERATORS[name](*points))
    torch.testing.assert_close(derivative, (ahead - behind) / (2 * step), atol=1e-8, rtol=1e-6)


def test_forward_over_reverse():
    query, key, value = (tensor[:1, :, :2].double() for tensor in inputs())
    loss = lambda query: attention(query, key, value, MAP).square().sum()  # noqa: E731
    direct = torch.autograd.functional.hessian(
        lambda query: reference("attention").run(call_of(query, key, value))[0].square().sum(), query
    )
    torch.testing.assert_close(torch.func.hessian(loss)(query), direct)


@pytest.mark.parametrize("name", ["attention", "attention_varlen"])
def test_per_sample_gradients_and_ensembles(name):
    """torch.func's transforms, which look into no operator."""
    points = inputs(dtype=torch.float64)
    loss = lambda *tensors: OPERATORS[name](*tensors).square().sum()  # noqa: E731
    several = [torch.stack([tensor, 2 * tensor]) for tensor in points]
    outputs, gradients = torch.vmap(OPERATORS[name])(*several), torch.vmap(torch.func.grad(loss))(*several)
    for index in range(2):
        leaves = [tensor[index].clone().requires_grad_() for tensor in several]
        expected = OPERATORS[name](*leaves)
        torch.testing.assert_close(outputs[index], expected)
        expected.square().sum().backward()
        torch.testing.assert_close(gradients[index], leaves[0].grad)


def test_negated_views_and_other_devices():
    query, key, value = inputs(dtype=torch.complex64)
    negated = query.conj().imag  # a view whose memory holds the negated values
    assert negated.is_neg()
    torch.testing.assert_close(attention(negated, key.real, value.real, MAP), attention(negated.clone(), key.real, value.real, MAP))
    assert attention(*(tensor.to("meta") for tensor in inputs()), MAP).shape == (2, 3, 5, 8)
