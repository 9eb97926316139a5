"""Decode attention: each sample must give what attention gives on its own part of the cache."""

from contextlib import nullcontext

import pytest
import torch

from headprune import ops
from headprune.errors import InvalidInput
from headprune.head_map import HeadMap
from headprune.ops.call import DecodeCall, operands
from headprune.ops.decode import as_decode_call

RAGGED = HeadMap((0, 0, 0, 1, 2, 2, 2), 3)


def cache(dtype=torch.float64, batch=3, new=2, capacity=12, dim=8, value_dim=6, seed=0):
    """query, key cache, value cache, lengths; what lies behind the lengths is NaN."""
    torch.manual_seed(seed)
    q = torch.randn(batch, 7, new, dim, dtype=dtype)
    k, v = torch.randn(batch, 3, capacity, dim, dtype=dtype), torch.randn(batch, 3, capacity, value_dim, dtype=dtype)
    lengths = torch.tensor([capacity, 5, 1][:batch], dtype=torch.int32)
    for sample, length in enumerate(lengths):
        k[sample, :, length:] = v[sample, :, length:] = float("nan")
    return q, k, v, lengths


def as_pages(tensor: torch.Tensor, size: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """(pages, page table) that hold what the contiguous cache holds, in a shuffled order."""
    batch, heads, capacity, dim = tensor.shape
    count = capacity // size
    order = torch.randperm(batch * count, generator=torch.Generator().manual_seed(seed))
    pages = torch.empty(batch * count, heads, size, dim, dtype=tensor.dtype)
    pages[order] = tensor.reshape(batch, heads, count, size, dim).transpose(1, 2).flatten(0, 1)
    return pages, order.reshape(batch, count).int()


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_each_sample_gives_what_attention_gives_on_its_own_cache(backend):
    q, k, v, lengths = cache()
    options = {"window": 4, "softcap": 3.0, "alibi_slopes": torch.rand(7).double(), "sinks": torch.randn(7).double()}
    gate = torch.rand(3, 7).double()
    with ops.backend(backend):
        found = ops.attention_decode(q, k, v, lengths, RAGGED, gate=gate, **options)
    for sample, length in enumerate(lengths):
        new = min(2, int(length))
        one = slice(sample, sample + 1)
        own = (q[one, :, 2 - new :], k[one, :, :length], v[one, :, :length])
        expected = ops.attention(*own, RAGGED, causal=True, gate=gate[one], **options)
        assert torch.allclose(found[one, :, 2 - new :], expected, atol=1e-12)
    assert (found[2, :, 0] == 0).all(), "the first of 2 new tokens stands before the only key"


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_a_paged_cache_gives_what_a_contiguous_one_gives(backend):
    q, k, v, lengths = cache()
    keys, table = as_pages(k, 4)
    values, _ = as_pages(v, 4)
    table[1, 2:] = 10**6
    with ops.backend(backend):
        expected = ops.attention_decode(q, k, v, lengths, RAGGED)
        assert torch.equal(ops.attention_decode(q, keys, values, lengths, RAGGED, page_table=table), expected)


def test_a_left_padded_sample_does_not_see_its_padding():
    q, k, v, _ = cache(batch=1, new=1)
    lengths, mask = torch.tensor([12], dtype=torch.int32), torch.arange(12)[None] >= 5
    k[0, :, :5] = float("nan")
    found = ops.attention_decode(q, k, v, lengths, RAGGED, key_mask=mask)
    assert torch.allclose(found, ops.attention(q, k[:, :, 5:], v[:, :, 5:], RAGGED, causal=True), atol=1e-12)


def test_the_operator_passes_opcheck_and_compiles_whole():
    q, k, v, lengths = cache(torch.float32)
    call = DecodeCall(q, k, v, lengths, None, RAGGED, 0, 0.3, 0.0, None, None, None, None)
    assert as_decode_call(*operands(call)) == call
    torch.library.opcheck(torch.ops.headprune.attention_decode, operands(call))
    run = lambda q, k, v: ops.attention_decode(q, k, v, lengths, RAGGED) * 2  # noqa: E731
    assert torch.equal(torch.compile(run, fullgraph=True, backend="aot_eager")(q, k, v), run(q, k, v))


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"lengths": torch.tensor([1, 2, 3])}, "lengths is torch.int64"),
        ({"lengths": torch.ones(2, dtype=torch.int32)}, "lengths has shape"),
        ({"lengths": torch.tensor([1, 13, 2], dtype=torch.int32)}, r"lengths\[1\] is 13; the cache holds 0 to 12 keys"),
        ({"lengths": torch.tensor([-1, 3, 2], dtype=torch.int32)}, r"lengths\[0\] is -1; the cache holds 0 to 12 keys"),
        ({"lengths": torch.ones(3, dtype=torch.int32, device="meta")}, "lengths is on meta, the query on cpu"),
        ({"query": torch.zeros(3, 7, 9, 8)}, "9 new tokens"),
        ({"page_table": torch.zeros(2, 4, dtype=torch.int32)}, "page_table has shape"),
        ({"page_table": torch.zeros(3, dtype=torch.int32)}, r"page_table has shape \[3\]; expected \[batch, pages_per_sample\]"),
        ({"lengths": torch.tensor(1, dtype=torch.int32)}, r"lengths has shape \[\]; expected \[batch\]"),
        ({"head_map": HeadMap.uniform(7)}, "key_cache has shape"),
        ({"query": torch.zeros(3, 7, 1, 8, requires_grad=True)}, "no gradient"),
        ({"gate": torch.ones(7, requires_grad=True)}, "no gradient"),
        ({"sinks": torch.ones(7, requires_grad=True)}, "no gradient"),
        ({"query": torch.zeros(7, 1, 8), "head_map": None}, r"query has shape \[7, 1, 8\]; expected 4 dimensions"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change, names):
    q, k, v, lengths = cache(torch.float32)
    arguments = {"query": q, "key_cache": k, "value_cache": v, "lengths": lengths, "head_map": RAGGED, **change}
    for backend in (nullcontext(), ops.backend("reference")):
        with backend, pytest.raises(InvalidInput, match=names):
            ops.attention_decode(**arguments)
