"""Packed attention: every sequence must see itself alone, with every option."""

from itertools import pairwise

import pytest
import torch

from headprune import ops
from headprune.errors import InvalidInput
from headprune.head_map import HeadMap
from headprune.ops.call import VarlenCall, operands
from headprune.ops.varlen import as_varlen_call

RAGGED = HeadMap((0, 0, 0, 1, 2, 2, 2), 3)
LENGTHS_Q, LENGTHS_K = (3, 0, 1, 6), (5, 2, 1, 4)


def starts(lengths) -> torch.Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def packed(dtype=torch.float64, seed=0, lengths_q=LENGTHS_Q, lengths_k=LENGTHS_K, dim=8, value_dim=6):
    torch.manual_seed(seed)
    q = torch.randn(sum(lengths_q), 7, dim, dtype=dtype)
    k, v = torch.randn(sum(lengths_k), 3, dim, dtype=dtype), torch.randn(sum(lengths_k), 3, value_dim, dtype=dtype)
    return q, k, v, starts(lengths_q), starts(lengths_k)


def test_second_derivatives_are_right_where_one_tensor_is_all():
    x, cu = torch.randn(5, 2, 4).double().requires_grad_(), starts((2, 0, 3))
    assert torch.autograd.gradgradcheck(lambda x: ops.attention_varlen(x, x, x, cu, cu, causal=True), (x,))


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("causal", [False, True])
def test_packed_sequences_give_what_each_gives_alone(causal, backend):
    lengths = (3, 0, 1, 6)
    q, k, v, cu, _ = packed(lengths_q=lengths, lengths_k=lengths)
    options = {
        "causal": causal,
        "window": 3,
        "softcap": 4.0,
        "alibi_slopes": torch.rand(7).double(),
        "sinks": torch.randn(7).double(),
    }
    gate = torch.rand(4, 7).double()
    with ops.backend(backend):
        found, stats = ops.attention_varlen(q, k, v, cu, cu, RAGGED, gate=gate, stats=True, **options)
    for index, (start, stop) in enumerate(pairwise(cu)):
        alone = [tensor[start:stop].transpose(0, 1)[None] for tensor in (q, k, v)]
        with ops.backend(backend):
            expected, expected_stats = ops.attention(*alone, RAGGED, gate=gate[index : index + 1], stats=True, **options)
        assert torch.equal(found[start:stop], expected[0].transpose(0, 1))
        assert torch.equal(stats.entropy[index], expected_stats.entropy[0])


def test_causal_is_bottom_right_aligned_in_each_sequence():
    q, k, v, cu_q, cu_k = packed(lengths_q=(2, 4), lengths_k=(5, 3))
    found = ops.attention_varlen(q, k, v, cu_q, cu_k, RAGGED, causal=True)
    alone = [tensor.transpose(0, 1)[None] for tensor in (q[:2], k[:5], v[:5])]
    assert torch.equal(found[:2], ops.attention(*alone, RAGGED, causal=True)[0].transpose(0, 1))
    assert (found[2] == 0).all(), "the first of 4 queries stands before the first of 3 keys"
    assert torch.equal(found[3], v[5, list(RAGGED.kv_of_query)])


def test_gradients_are_right():
    q, k, v, cu_q, cu_k = packed(dim=3, value_dim=2)
    gate = torch.rand(4, 7).double()
    gate[0, 1] = 0.0
    leaves = [tensor.requires_grad_() for tensor in (q, k, v, torch.randn(7).double(), gate)]
    run = lambda q, k, v, sinks, gate: ops.attention_varlen(q, k, v, cu_q, cu_k, RAGGED, sinks=sinks, gate=gate)  # noqa: E731
    assert torch.autograd.gradcheck(run, leaves)


def test_the_operator_passes_opcheck_and_compiles_whole():
    q, k, v, cu_q, cu_k = packed(torch.float32)
    call = VarlenCall(q.requires_grad_(), k, v, cu_q, cu_k, 6, 5, RAGGED, True, 0, 0.3, 0.0, None, None, None, True)
    assert as_varlen_call(*operands(call)) == call
    torch.library.opcheck(torch.ops.headprune.attention_varlen, operands(call))

    def run(q, k, v):
        return ops.attention_varlen(q, k, v, cu_q, cu_k, RAGGED, max_seqlen_q=6, max_seqlen_k=5, causal=True) * 2

    assert torch.equal(torch.compile(run, fullgraph=True, backend="aot_eager")(q, k, v), run(q, k, v))


class Alone(torch.nn.Module):
    def forward(self, query, starts):
        return ops.attention_varlen(query, query, query, starts, starts, causal=True)


def test_the_longest_lengths_need_not_be_known_to_compile_and_export():
    free = torch.export.Dim.AUTO
    first = torch.randn(9, 2, 8), starts((4, 5))
    program = torch.export.export(Alone(), first, dynamic_shapes=({0: free}, {0: free})).module()
    compiled = torch.compile(Alone(), fullgraph=True, dynamic=True, backend="aot_eager")
    for lengths in ((4, 5), (6, 1), (3, 2, 7)):
        call = torch.randn(sum(lengths), 2, 8, requires_grad=True), starts(lengths)
        expected = Alone()(*call)
        assert torch.equal(program(*call), expected)
        found = compiled(*call)
        assert torch.equal(found, expected)
        assert torch.equal(*(torch.autograd.grad(output.square().sum(), call[0])[0] for output in (found, expected)))


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"cu_seqlens_q": starts(LENGTHS_Q).long()}, "cu_seqlens_q is torch.int64"),
        ({"cu_seqlens_k": starts((5, 7))}, "cu_seqlens_k has shape"),
        (
            {"cu_seqlens_q": starts(LENGTHS_Q)[None]},
            rf"cu_seqlens_q has shape \[1, {len(LENGTHS_Q) + 1}\]; expected \[sequences \+ 1\]",
        ),
        ({"cu_seqlens_q": torch.tensor(0, dtype=torch.int32)}, r"cu_seqlens_q has shape \[\]; expected \[sequences \+ 1\]"),
        ({"head_map": HeadMap.uniform(7)}, "key has shape"),
        ({"gate": torch.ones(2, 7)}, "gate has shape"),
        ({"cu_seqlens_k": starts(LENGTHS_Q).to("meta"), "max_seqlen_k": 5}, "cu_seqlens_k is on meta, the query on cpu"),
        ({"softcap": -1.0}, "softcap is -1.0; expected a finite"),
        ({"alibi_slopes": torch.ones(7, requires_grad=True)}, "alibi_slopes has no gradient; detach it"),
        ({"cu_seqlens_q": starts(LENGTHS_Q) + 1}, "cu_seqlens_q begins with 1"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change, names):
    q, k, v, cu_q, cu_k = packed(torch.float32)
    arguments = {"query": q, "key": k, "value": v, "cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "head_map": RAGGED, **change}
    with pytest.raises(InvalidInput, match=names):
        ops.attention_varlen(**arguments)
