"""Packed attention in C++ against the reference in fp64."""

from dataclasses import replace
from itertools import combinations

import pytest
import torch
from attention_calls import EPSILON, Shape

from headprune.ops import reference
from headprune.ops.call import VarlenCall, check_varlen
from headprune.ops.cpp import attention_varlen_backward, attention_varlen_forward, missing

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))
OPTIONS = ("causal", "window", "softcap", "alibi", "sinks", "gate", "sample_gate", "stats")


def starts(lengths) -> torch.Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def make_call(options=(), lengths_q=(3, 0, 70, 6), lengths_k=(5, 2, 150, 4), tail=0, dtype=torch.float32) -> VarlenCall:
    """A random call; `tail` tokens lie behind the last sequence."""
    generator = torch.Generator().manual_seed(len(options))

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator)

    head_map, sequences = Shape().head_map, len(lengths_q)
    gate = normal(sequences, 6)
    gate[:, ::3] = 0
    chosen = {
        "causal": {"causal": True},
        "window": {"window": 9},
        "softcap": {"softcap": 1.5},
        "alibi": {"alibi_slopes": torch.rand(6, generator=generator)},
        "sinks": {"sinks": normal(6)},
        "gate": {"gate": normal(6)},
        "sample_gate": {"gate": gate},
        "stats": {"stats": True},
    }
    q = normal(sum(lengths_q) + tail, 6, 20).to(dtype)
    k, v = normal(sum(lengths_k) + tail, 3, 20).to(dtype), normal(sum(lengths_k) + tail, 3, 12).to(dtype)
    longest = max(lengths_q, default=0), max(lengths_k, default=0)
    call = VarlenCall(
        q, k, v, starts(lengths_q), starts(lengths_k), *longest, head_map, False, 0, 20**-0.5, 0.0, None, None, None, False
    )
    for option in options:
        call = replace(call, **chosen[option])
    return check_varlen(call)


def in_fp64(call: VarlenCall) -> VarlenCall:
    return replace(call, query=call.query.double(), key=call.key.double(), value=call.value.double())


def assert_close(ours: torch.Tensor, right: torch.Tensor, theirs: torch.Tensor, dtype: torch.dtype, name: str) -> None:
    assert ours.shape == right.shape, name
    assert ours.isfinite().all(), name
    if ours.numel():
        allowed = 2 * (theirs.double() - right).abs().max() + 8 * EPSILON[dtype] * max(1, right.abs().max())
        assert (ours.double() - right).abs().max() <= allowed, name


def assert_matches_reference(call: VarlenCall) -> None:
    output, lse, packed = attention_varlen_forward(call)
    exact, exact_lse, exact_packed = reference.attention_varlen_forward(in_fp64(call))
    assert_close(output, exact, reference.attention_varlen_forward(call)[0], call.query.dtype, "output")
    torch.testing.assert_close(packed, exact_packed, rtol=1e-4, atol=2e-5)
    if call.gate is None:
        torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-5)
    needs = (True, True, True, call.sinks is not None, call.gate is not None)
    grad_output = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output.dtype)
    found = attention_varlen_backward(call, grad_output, output, lse, needs)
    right = reference.attention_varlen_backward(in_fp64(call), grad_output.double(), needs)
    theirs = reference.attention_varlen_backward(call, grad_output, needs)
    for name, need, *grads in zip(reference.VARLEN_DIFFERENTIABLE, needs, found, right, theirs):
        if need:
            assert_close(*grads, call.query.dtype, name)
        else:
            assert grads[0] is None


@pytest.mark.parametrize("dtype", EPSILON)
def test_every_option_alone_matches_the_reference(dtype):
    for option in OPTIONS:
        assert_matches_reference(make_call((option,), dtype=dtype))


def test_every_pair_of_options_matches_the_reference():
    for pair in combinations(OPTIONS, 2):
        assert_matches_reference(make_call(pair))


@pytest.mark.parametrize("lengths", [((), ()), ((0,), (0,)), ((4,), (0,)), ((9, 1), (3, 1)), ((1, 2), (1300, 40))], ids=str)
def test_sequences_of_any_length_match_the_reference(lengths):
    for options in [(), ("causal", "stats"), ("causal", "window", "sinks")]:
        assert_matches_reference(make_call(options, *lengths))


def test_tokens_behind_the_last_sequence_give_zero():
    call = make_call(("gate",), tail=3)
    output, lse, _ = attention_varlen_forward(call)
    assert (output[-3:] == 0).all()
    assert (lse[:, -3:] == float("-inf")).all()
    assert_matches_reference(make_call((), tail=3))


@pytest.mark.parametrize("forward", [attention_varlen_forward, reference.attention_varlen_forward], ids=["cpp", "reference"])
def test_starts_that_do_not_fit_are_refused(forward):
    call = make_call()
    starts, tokens = call.cu_seqlens_q, call.query.shape[0]
    beyond, falling = starts.clone(), starts.flip(0)
    beyond[-1], falling[0] = tokens + 1, 0
    for change, message in (
        (starts + 1, "cu_seqlens_q begins with 1; expected 0"),
        (beyond, f"is {tokens + 1} behind .* within the {tokens} tokens"),
        (falling, r"cu_seqlens_q\[2\] is .*; expected starts that do not fall"),
    ):
        with pytest.raises(ValueError, match=message):
            forward(replace(call, cu_seqlens_q=change))
    with pytest.raises(ValueError, match="cu_seqlens_k"):
        forward(replace(call, cu_seqlens_k=call.cu_seqlens_k + 1))
