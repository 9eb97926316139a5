"""Projections of every layout of heads, and how exact their statistics must be."""

from __future__ import annotations

import torch
from torch import Tensor

from headprune import ops
from headprune.ops import HeadSlices, reference
from headprune.ops.weight_slices import WeightCall


def random_weight(rows: int, columns: int, dtype: torch.dtype, device: str, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, columns, generator=generator) * 0.1).to(device, dtype)


def projections(dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> list[HeadSlices]:
    """Rows, columns, fused with an offset, interleaved, Conv1D, shared groups, scattered features, odd sizes, views."""
    weight = lambda rows, columns: random_weight(rows, columns, dtype, device, seed + rows)  # noqa: E731
    fused, wide, shared = weight(96, 40), weight(72, 1200), weight(5 * 16, 24)
    groups = torch.tensor([0, 1, 3])[:, None] * 16 + torch.arange(16)
    scattered = torch.randperm(60, generator=torch.Generator().manual_seed(1)).view(5, 12)
    interleaved = torch.arange(64).view(16, 4).t()  # head h owns h, h + 4, h + 8, ...
    return [
        HeadSlices.contiguous(weight(64, 48), 4, 16),
        HeadSlices.contiguous(weight(48, 128), 8, 16, dim=1),
        *(HeadSlices.contiguous(fused, 4, 8, start=offset) for offset in (0, 32, 64)),
        *(HeadSlices.contiguous(wide, 3, 8, start=offset, stride=24) for offset in (0, 8, 16)),
        HeadSlices.contiguous(weight(33, 90), 3, 10, dim=1, start=30),
        HeadSlices.contiguous(weight(1, 300), 3, 100, dim=1),
        HeadSlices.indexed(shared, groups),
        HeadSlices.indexed(weight(21, 60), scattered, dim=1),
        HeadSlices.indexed(weight(64, 7), interleaved),
        HeadSlices.contiguous(weight(30, 50).t(), 5, 10),
        HeadSlices.contiguous(weight(40, 500)[::2, :300], 4, 5),
        HeadSlices.contiguous(weight(40, 500)[::2, ::2], 4, 5),
        HeadSlices.contiguous(weight(0, 16), 0, 8),
        HeadSlices.contiguous(weight(2 * 1100, 120), 2, 1100),
    ]  # fmt: skip


def gradients(slices: list[HeadSlices], seed: int = 100) -> list[Tensor]:
    """One for each weight; some laid out differently from it."""
    made = []
    for index, one in enumerate(slices):
        grad = random_weight(*one.weight.shape, one.weight.dtype, str(one.weight.device), seed + index)
        made.append(grad.t().contiguous().t() if index % 3 == 1 else grad)
    return made


def weight_call(dtype: torch.dtype, grads: bool, device: str = "cpu", most_spans: int | None = None) -> WeightCall:
    """All of them, or those of at most `most_spans` spans."""
    slices = [one for one in projections(dtype, device) if most_spans is None or len(one.spans) <= most_spans]
    return WeightCall.of(slices, gradients(slices) if grads else [])


def assert_exact(found: Tensor, call: WeightCall) -> None:
    """At most twice the error that PyTorch makes in fp32, and a few roundings, against fp64."""
    double = WeightCall(
        tuple(w.double() for w in call.weights), tuple(g.double() for g in call.grads), call.dims, call.spans, call.heads
    )
    exact, same = reference.head_weight_stats(double).double(), reference.head_weight_stats(call).double()
    assert found.shape == exact.shape
    assert found.dtype == torch.float32
    # A sum of products may cancel: its size is that of its terms.
    size = exact.abs()
    if call.grads:
        size[3] = exact[4]
    allowed = 2 * (same - exact).abs() + 16 * torch.finfo(torch.float32).eps * size
    assert ((found.double() - exact).abs() <= allowed).all()
    assert torch.equal(found[2], exact[2].float())


def check_graph_replay(backend: str) -> None:
    """A captured call reads the weights as they are when it is replayed."""
    slices = [HeadSlices.contiguous(torch.randn(256, 512, device="cuda"), 4, 64)]
    with ops.backend(backend):
        ops.head_weight_stats(slices)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            (found,) = ops.head_weight_stats(slices)
        slices[0].weight.normal_()
        graph.replay()
        (again,) = ops.head_weight_stats(slices)
        assert torch.equal(found.l1, again.l1)
