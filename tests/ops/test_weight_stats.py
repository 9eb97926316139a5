"""Weight statistics of heads: the operator, its arguments and its reference."""

import pytest
import torch
from weight_cases import gradients, projections, weight_call

from headprune import ops
from headprune.errors import InvalidInput
from headprune.ops import HeadSlices, HeadSpan, reference
from headprune.ops.weight_slices import spans_of
from headprune.ops.weight_stats import weight_operands


def owned(slices: HeadSlices, head: int) -> list[int]:
    """The features of one head."""
    return [
        span.start + (head - span.head) * span.stride + feature
        for span in slices.spans
        if span.head <= head < span.head + span.heads
        for feature in range(span.width)
    ]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["reference", None])
def test_every_layout_gives_the_statistics_of_each_head_s_own_weights(dtype, backend):
    if backend is None and dtype == torch.float64:
        pytest.skip("fp64 runs through the reference")
    slices = projections(dtype)
    grads = gradients(slices)
    if backend is None:
        found = ops.head_weight_stats(slices, grads)
    else:
        with ops.backend(backend):
            found = ops.head_weight_stats(slices, grads)
    assert len(found) == len(slices)
    for one, grad, stats in zip(slices, grads, found):
        assert stats.l1.shape == (one.heads,)
        for head in range(one.heads):
            w, g = (tensor.movedim(one.dim, 0)[owned(one, head)].double() for tensor in (one.weight, grad))
            expected = [w.abs().sum(), w.square().sum(), w.abs().max(), w.numel(), (w * g).sum(), (w * g).abs().sum()]
            expected = torch.tensor([*expected, (w * g).square().sum()])
            ours = (stats.l1, stats.square, stats.max, stats.count, stats.dot, stats.dot_abs, stats.dot_square)
            torch.testing.assert_close(torch.stack([value[head] for value in ours]), expected.float(), rtol=1e-5, atol=1e-6)
            assert stats.l2[head] == pytest.approx(float(w.norm()), rel=1e-5)


def test_without_gradients_their_statistics_are_none():
    found = ops.head_weight_stats(projections())
    assert all(stats.dot is stats.dot_abs is stats.dot_square is None for stats in found)


def test_dtypes_may_be_mixed_and_a_head_without_weights_counts_zero():
    few = HeadSlices(torch.ones(4, 3, dtype=torch.bfloat16), 0, 3, (HeadSpan(1, 1, 2, 0, 2),))
    other = HeadSlices.contiguous(torch.full((2, 5), -2.0), 2, 1)
    first, second = ops.head_weight_stats([few, other])
    assert first.l1.tolist() == first.count.tolist() == [0, 6, 0]
    assert first.max.tolist() == [0, 1, 0]
    assert second.l1.tolist() == [10, 10]
    assert ops.head_weight_stats([]) == []


@pytest.mark.parametrize("backend", ["reference", None])
def test_nan_in_a_weight_reaches_every_statistic_of_its_head_alone(backend):
    weight = torch.ones(6, 40)
    weight[3, 7] = float("nan")
    with ops.backend(backend) if backend else torch.no_grad():
        (stats,) = ops.head_weight_stats([HeadSlices.contiguous(weight, 3, 2)])
    for values in (stats.l1, stats.square, stats.max):
        assert values.isnan().tolist() == [False, True, False]


def test_single_and_missing_rows_and_columns_have_odd_strides():
    column = torch.randn(1, 6).t().contiguous(memory_format=torch.contiguous_format)
    layouts = [
        (torch.randn(6, 3)[:, :1], column),
        (torch.randn(1, 6).expand(1, 6)[:, :6], torch.randn(6, 1).t()),
        (torch.randn(6, 0), torch.randn(0, 6).t()),
        (torch.empty_strided((6, 0), (0, 0)), torch.randn(6, 0)),
        (torch.empty_strided((1, 1), (0, 0)).fill_(2.0), torch.ones(1, 1)),
    ]
    for weight, grad in layouts:
        heads = min(3, weight.shape[0])
        (stats,) = ops.head_weight_stats([HeadSlices.contiguous(weight, heads, weight.shape[0] // heads)], [grad])
        torch.testing.assert_close(stats.l1, weight.abs().view(heads, -1).sum(1))
        torch.testing.assert_close(stats.dot, (weight * grad).view(heads, -1).sum(1))


def test_the_fewest_spans_describe_a_layout():
    rows = lambda *starts: torch.tensor(starts)[:, None] + torch.arange(4)  # noqa: E731
    assert spans_of(rows(0, 4, 8)) == (HeadSpan(0, 3, 0, 4, 4),)
    assert spans_of(rows(2, 14, 26)) == (HeadSpan(0, 3, 2, 12, 4),)
    assert spans_of(rows(0, 4, 16, 20)) == (HeadSpan(0, 2, 0, 4, 4), HeadSpan(2, 2, 16, 4, 4))
    assert len(spans_of(torch.arange(12).view(4, 3).t())) == 4
    assert spans_of(torch.empty(0, 4, dtype=torch.long)) == ()


@pytest.mark.parametrize("grads", [False, True])
def test_opcheck(grads):
    torch.library.opcheck(torch.ops.headprune.head_weight_stats, weight_operands(weight_call(torch.float32, grads)))


def test_it_compiles_whole():
    def norms(weight):
        (stats,) = ops.head_weight_stats([HeadSlices.contiguous(weight, 4, 16)])
        return stats.l1 + stats.l2

    weight = torch.randn(64, 30)
    torch.testing.assert_close(torch.compile(norms, fullgraph=True, backend="aot_eager")(weight), norms(weight))


def test_weights_that_need_gradients_are_read_without_a_graph():
    weight = torch.nn.Parameter(torch.randn(8, 4))
    (stats,) = ops.head_weight_stats([HeadSlices.contiguous(weight, 2, 4)])
    assert not stats.l1.requires_grad


@pytest.mark.parametrize(
    ("slices", "grads", "names"),
    [
        (HeadSlices.contiguous(torch.zeros(8, 4), 3, 4), None, "8 features along its heads"),
        (HeadSlices.contiguous(torch.zeros(8, 4), 2, 4, start=-1), None, "reaches -1"),
        (HeadSlices.contiguous(torch.zeros(8, 4, dtype=torch.int8), 2, 4), None, "torch.int8"),
        (HeadSlices.contiguous(torch.zeros(8), 2, 4), None, "expected a floating"),
        (HeadSlices.contiguous(torch.zeros(8, 4), 2, 4, dim=2), None, "dim 2"),
        (HeadSlices(torch.zeros(8, 4), 0, 1, (HeadSpan(0, 2, 0, 4, 4),)), None, "has 1 heads"),
        (torch.zeros(8, 4), None, "projection 0 is a Tensor; expected HeadSlices"),
        (HeadSlices.contiguous(torch.zeros(8, 4), 2, 4), [], "0 gradients for 1"),
        (HeadSlices.contiguous(torch.zeros(8, 4), 2, 4), [torch.zeros(4, 8)], "gradient 0 is"),
        (HeadSlices.contiguous(torch.zeros(8, 4), 2, 4), [None], "gradient 0 is None"),
    ],
)
def test_what_does_not_fit_is_named(slices, grads, names):
    with pytest.raises(InvalidInput, match=names):
        ops.head_weight_stats([slices], grads)


def test_the_reference_computes_in_fp32_at_least():
    call = weight_call(torch.float16, True)
    assert reference.head_weight_stats(call).dtype == torch.float32
