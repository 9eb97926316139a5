"""Decode attention in C++ against the reference in fp64."""

from dataclasses import replace
from itertools import combinations

import pytest
import torch
from attention_calls import EPSILON, Shape, in_fp64
from attention_calls import make_call as make_attention
from hypothesis import given, settings
from hypothesis import strategies as st

from headprune.ops import reference
from headprune.ops.call import DecodeCall, check_decode
from headprune.ops.cpp import attention_decode, attention_forward, missing

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))
OPTIONS = ("window", "softcap", "alibi", "sinks", "padding", "key_mask", "gate", "sample_gate")
CAPACITY = 1300  # more than two of the parts that a cache is split into


def make_call(
    options=(), groups=(3, 1, 2), new=1, capacity=CAPACITY, lengths=(CAPACITY, 700, 9), dim=24, value_dim=40, dtype=torch.float32
) -> DecodeCall:
    """A random call; what lies behind the lengths is NaN."""
    generator = torch.Generator().manual_seed(len(options) + new)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator)

    head_map, batch = Shape(groups).head_map, len(lengths)
    heads = head_map.query_heads
    keys, values = (normal(batch, capacity, len(groups), width).transpose(1, 2).to(dtype) for width in (dim, value_dim))
    for sample, length in enumerate(lengths):
        keys[sample, :, length:] = values[sample, :, length:] = float("nan")
    gate = normal(batch, heads)
    head_gate = normal(heads)
    gate[:, 1::3] = head_gate[2::3] = 0
    chosen = {
        "window": {"window": 600},
        "softcap": {"softcap": 1.5},
        "alibi": {"alibi_slopes": torch.rand(heads, generator=generator) / 50},
        "sinks": {"sinks": normal(heads)},
        "padding": {"key_mask": torch.arange(capacity)[None] >= 4 * torch.arange(batch)[:, None]},
        "key_mask": {"key_mask": torch.rand(batch, capacity, generator=generator) < 0.7},
        "gate": {"gate": head_gate},
        "sample_gate": {"gate": gate},
    }
    call = DecodeCall(
        normal(batch, heads, new, dim).to(dtype), keys, values, torch.tensor(lengths, dtype=torch.int32), None, head_map, 0,
        dim**-0.5, 0.0, None, None, None, None,
    )  # fmt: skip
    for option in options:
        call = replace(call, **chosen[option])
    return check_decode(call)


def in_pages(call: DecodeCall, size: int) -> DecodeCall:
    """The same cache in shuffled pages; entries of the table behind a sample's length point nowhere."""
    batch, count = call.batch, call.capacity // size
    order = torch.randperm(batch * count, generator=torch.Generator().manual_seed(0))

    def paged(cache: torch.Tensor) -> torch.Tensor:
        pages = torch.empty(batch * count, size, cache.shape[1], cache.shape[3], dtype=cache.dtype).transpose(1, 2)
        pages[order] = cache.unflatten(2, (count, size)).transpose(1, 2).flatten(0, 1)
        return pages

    table = order.reshape(batch, count).int()
    table[torch.arange(count)[None] * size >= call.lengths[:, None]] = 10**6
    return check_decode(replace(call, key_cache=paged(call.key_cache), value_cache=paged(call.value_cache), page_table=table))


def assert_matches_reference(call: DecodeCall) -> None:
    found = attention_decode(call)
    clean = replace(call, key_cache=call.key_cache.nan_to_num(), value_cache=call.value_cache.nan_to_num())
    wide = {name: getattr(clean, name).double() for name in ("query", "key_cache", "value_cache")}
    exact, same = reference.attention_decode(replace(clean, **wide)), reference.attention_decode(clean)
    assert found.dtype == call.query.dtype
    assert found.transpose(1, 2).is_contiguous()
    assert found.isfinite().all()
    if found.numel():
        allowed = 2 * (same.double() - exact).abs().max() + 4 * EPSILON[call.query.dtype] * max(1, exact.abs().max())
        assert (found.double() - exact).abs().max() <= allowed


@pytest.mark.parametrize("dtype", EPSILON)
def test_every_option_alone_matches_the_reference(dtype):
    for option in OPTIONS:
        assert_matches_reference(make_call((option,), dtype=dtype))


def test_every_pair_of_options_matches_the_reference():
    for pair in combinations(OPTIONS, 2):
        assert_matches_reference(make_call(pair, new=2))


@pytest.mark.parametrize("new", range(1, 9))
def test_any_number_of_new_tokens_and_heads_matches_the_reference(new):
    for groups in [(1,), (5, 0, 3), (7, 2), (17, 4)]:
        assert_matches_reference(make_call(("window",), groups, new))


@pytest.mark.parametrize("size", [1, 20, 130, 650])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pages_match_the_reference(size, dtype):
    for options in [(), ("key_mask", "sinks"), ("window", "alibi")]:
        assert_matches_reference(in_pages(make_call(options, dtype=dtype), size))


@pytest.mark.parametrize(
    "shape",
    [
        {"lengths": ()},
        {"lengths": (0, 5)},
        {"lengths": (1, 2), "new": 4},
        {"groups": ()},
        {"dim": 128, "value_dim": 128},
        {"dim": 1, "value_dim": 1},
        {"dim": 65, "value_dim": 0},
        {"capacity": 0, "lengths": (0, 0)},
        {"capacity": 5000, "lengths": (5000,), "groups": (1,)},
    ],
    ids=str,
)
def test_shapes_at_the_edge_match_the_reference(shape):
    for options in [(), ("sinks", "gate"), ("padding",)]:
        assert_matches_reference(make_call(options, **shape))


@st.composite
def calls(draw) -> DecodeCall:
    """Any cache, contiguous or in pages, and any options."""
    capacity = 10 * draw(st.integers(1, 130))
    options = tuple(sorted(draw(st.sets(st.sampled_from(OPTIONS), max_size=4))))
    call = make_call(
        options,
        groups=tuple(draw(st.lists(st.integers(0, 9), min_size=1, max_size=3))),
        new=draw(st.integers(1, 8)),
        capacity=capacity,
        lengths=tuple(draw(st.lists(st.integers(0, capacity), max_size=3))),
        dim=draw(st.integers(1, 140)),
        value_dim=draw(st.integers(1, 140)),
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
    )
    size = draw(st.sampled_from([0, 1, 2, 5, 10]))
    return in_pages(call, size * capacity // 10) if size and call.batch else call


@settings(max_examples=100, deadline=None, derandomize=True)
@given(calls())
def test_random_calls_match_the_reference(call):
    assert_matches_reference(call)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_100_000_keys_match_the_reference(dtype):
    shape = {"groups": (17, 1), "capacity": 100_000, "lengths": (100_000,), "dim": 40, "value_dim": 33}
    assert_matches_reference(make_call((), dtype=dtype, **shape))
    assert_matches_reference(make_call(("sinks", "window"), dtype=dtype, **shape))


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_masked_keys_of_the_cache_may_hold_anything(poison):
    call = make_call(("key_mask",), new=3)
    hidden = ~call.key_mask[:, None, :, None]
    found = attention_decode(call)
    filled = {name: getattr(call, name).masked_fill(hidden, poison) for name in ("key_cache", "value_cache")}
    assert torch.equal(attention_decode(replace(call, **filled)), found)


def test_lengths_and_pages_outside_the_cache_are_refused():
    call = make_call()
    with pytest.raises(ValueError, match=r"lengths\[.*the cache holds 0 to"):
        attention_decode(replace(call, lengths=call.lengths + 1))
    paged = in_pages(call, 100)
    with pytest.raises(ValueError, match=r"page_table\[.*the cache has .* pages"):
        attention_decode(replace(paged, page_table=paged.page_table + 10**6))


def test_pages_in_front_of_the_window_may_have_been_given_back():
    paged = in_pages(make_call(("window",), new=2), 100)
    table, ends = paged.page_table.clone(), torch.arange(100, paged.capacity + 1, 100)
    gone = ends[None] <= (paged.lengths - paged.new - paged.window + 1)[:, None]
    assert gone.sum() > 3
    table[gone] = -1
    assert torch.equal(attention_decode(replace(paged, page_table=table)), attention_decode(paged))


def test_results_do_not_depend_on_the_number_of_threads():
    call = make_call(("sinks",))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = attention_decode(call)
        torch.set_num_threads(4)
        assert all(torch.equal(attention_decode(call), one) for _ in range(3))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("query_len", [1, 3, 9])
def test_attention_with_few_queries_splits_the_keys_and_keeps_its_statistics(query_len):
    for options in [("stats", "causal"), ("stats", "sinks", "bias"), ("stats", "causal", "window", "padding", "alibi")]:
        call = make_attention(Shape(query_len=query_len, kv_len=1300, head_dim=40), options)
        for ours, right in zip(attention_forward(call), reference.attention_forward(in_fp64(call))):
            torch.testing.assert_close(ours.double(), right.double(), rtol=1e-4, atol=2e-5)
