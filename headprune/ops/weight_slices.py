"""Where the heads lie in a weight, what is measured of them, and a call of the operator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from headprune.errors import InvalidInput


@dataclass(frozen=True)
class HeadSpan:
    """Heads `head` up to `head + heads`; head + i owns the `width` features from `start + i * stride` on."""

    head: int
    heads: int
    start: int
    stride: int
    width: int


@dataclass(frozen=True)
class HeadSlices:
    """A weight [features, other] (`dim` 0) or [other, features] (`dim` 1) and the features of each of its `heads`.

    A head's features are those of all spans that name it: one span for heads one after another or interleaved with others at
    an even distance, several for anything else.
    """

    weight: Tensor
    dim: int
    heads: int
    spans: tuple[HeadSpan, ...]

    @classmethod
    def contiguous(
        cls, weight: Tensor, heads: int, width: int, dim: int = 0, start: int = 0, stride: int | None = None
    ) -> HeadSlices:
        """Head h owns the features start + h * stride up to start + h * stride + width; stride is width by default.

        Queries, keys and values of a fused projection differ in `start`; interleaved per head, stride is 3 * width.
        """
        return cls(weight, dim, heads, (HeadSpan(0, heads, start, width if stride is None else stride, width),))

    @classmethod
    def indexed(cls, weight: Tensor, features: Tensor, dim: int = 0) -> HeadSlices:
        """Head h owns `features[h]`; int64 [heads, width], on the CPU."""
        return cls(weight, dim, features.shape[0], spans_of(features))


def spans_of(features: Tensor) -> tuple[HeadSpan, ...]:
    """The fewest spans of whole columns of `features` [heads, width] that say the same."""
    heads, width = features.shape
    if not heads or not width:
        return ()
    same = torch.equal(features, features[0, 0] + torch.arange(features.numel(), device=features.device).view(heads, width))
    if same:  # by far the most frequent, and the cheapest to see
        return (HeadSpan(0, heads, int(features[0, 0]), width, width),)
    breaks = (features.diff(dim=1) != 1).any(dim=0).nonzero().flatten() + 1
    spans: list[HeadSpan] = []
    for column, stop in pairwise([0, *breaks.tolist(), width]):
        spans += evenly_spaced(features[:, column].tolist(), stop - column)
    return tuple(spans)


def evenly_spaced(starts: list[int], width: int) -> list[HeadSpan]:
    """Spans of heads whose first features lie at even distances."""
    spans, head = [], 0
    while head < len(starts):
        last = min(head + 1, len(starts) - 1)
        stride = starts[last] - starts[head]
        while last + 1 < len(starts) and starts[last + 1] - starts[last] == stride:
            last += 1
        spans.append(HeadSpan(head, last - head + 1, starts[head], stride, width))
        head = last + 1
    return spans


@dataclass(frozen=True)
class WeightStats:
    """Of each head's weights w in one projection, with gradients g: each fp32 [heads].

    l1: sum |w|. square: sum w^2. max: max |w|. count: how many weights. dot: sum w g. dot_abs: sum |w g|. dot_square: sum (w g)^2;
    the latter three are None without gradients. Where a head owns no weight every field is 0.
    """

    l1: Tensor
    square: Tensor
    max: Tensor
    count: Tensor
    dot: Tensor | None = None
    dot_abs: Tensor | None = None
    dot_square: Tensor | None = None

    @property
    def l2(self) -> Tensor:
        """The L2 norms, [heads]: the root of `square`."""
        return self.square.sqrt()


STATISTICS = 3  # that the operator gives without gradients: l1, square, max
GRADIENT_STATISTICS = 6  # and with them: dot, dot_abs, dot_square

# (projection, first head among all projections' heads, heads, start, stride, width)
Span = tuple[int, int, int, int, int, int]


@dataclass(frozen=True)
class WeightCall:
    """One call of the operator: weights of one dtype on one device; gradients as the weights, or none at all.

    `dims[p]` is the dimension of weights[p] along which its heads lie, `heads` the number of heads of all of them.
    """

    weights: tuple[Tensor, ...]
    grads: tuple[Tensor, ...]
    dims: tuple[int, ...]
    spans: tuple[Span, ...]
    heads: int

    @classmethod
    def of(cls, projections: Sequence[HeadSlices], grads: Sequence[Tensor]) -> WeightCall:
        spans, first = [], 0
        for index, slices in enumerate(projections):
            spans += [(index, first + span.head, span.heads, span.start, span.stride, span.width) for span in slices.spans]
            first += slices.heads
        weights = tuple(slices.weight.detach() for slices in projections)
        return cls(weights, tuple(grad.detach() for grad in grads), tuple(s.dim for s in projections), tuple(spans), first)

    @property
    def statistics(self) -> int:
        return GRADIENT_STATISTICS if self.grads else STATISTICS

    @property
    def device(self) -> torch.device:
        return self.weights[0].device

    @property
    def dtype(self) -> torch.dtype:
        return self.weights[0].dtype

    def flat_spans(self) -> list[int]:
        return [number for span in self.spans for number in span]

    def shapes(self) -> tuple[tuple[int, int], ...]:
        return tuple((weight.shape[0], weight.shape[1]) for weight in self.weights)

    def readable(self) -> WeightCall:
        """The same call with a stride of 1 in every weight and gradients laid out like their weights; copies where they are not."""
        ours = tuple(weight if 1 in weight.stride() else row_by_row(weight) for weight in self.weights)
        if not self.grads or all(grad.stride() == weight.stride() for grad, weight in zip(self.grads, ours)):
            return self if all(a is b for a, b in zip(ours, self.weights)) else replace(self, weights=ours)
        pairs = [(w, g) if w.stride() == g.stride() else (row_by_row(w), row_by_row(g)) for w, g in zip(ours, self.grads)]
        return replace(self, weights=tuple(w for w, _ in pairs), grads=tuple(g for _, g in pairs))

    def counts(self) -> Tensor:
        """How many weights each head owns, fp32 [heads]."""
        return weight_counts(self.shapes(), self.dims, self.spans, self.heads, self.device)


def row_by_row(matrix: Tensor) -> Tensor:
    """A contiguous copy; `.contiguous()` gives the matrix itself where only the strides of single or no rows or columns are odd."""
    return matrix.clone(memory_format=torch.contiguous_format)


@lru_cache(maxsize=32)
def weight_counts(
    shapes: tuple[tuple[int, ...], ...], dims: tuple[int, ...], spans: tuple[Span, ...], heads: int, device: torch.device
) -> Tensor:
    counts = torch.zeros(heads, dtype=torch.float64, device="cpu")
    for projection, head, count, _, _, width in spans:
        counts[head : head + count] += width * shapes[projection][1 - dims[projection]]
    return counts.float().to(device)


def check_slices(projections: Sequence[HeadSlices], grads: Sequence[Tensor] | None) -> None:
    """InvalidInput unless every span lies in its weight and every gradient is like its weight."""
    for index, slices in enumerate(projections):
        if not isinstance(slices, HeadSlices):
            raise InvalidInput(
                f"projection {index} is a {type(slices).__name__}; expected HeadSlices, which says where its heads lie: "
                "HeadSlices.contiguous(weight, heads, width)."
            )
        weight = slices.weight
        if weight.dim() != 2 or not weight.dtype.is_floating_point or slices.dim not in (0, 1):
            raise InvalidInput(
                f"projection {index} is {weight.dtype} {list(weight.shape)} with heads along dim {slices.dim}; "
                "expected a floating [out, in] weight and dim 0 or 1."
            )
        features = weight.shape[slices.dim]
        for span in slices.spans:
            check_span(span, index, slices.heads, features)
    if grads is None:
        return
    if len(grads) != len(projections):
        raise InvalidInput(f"{len(grads)} gradients for {len(projections)} projections; give one for each.")
    for index, (slices, grad) in enumerate(zip(projections, grads)):
        weight = slices.weight
        if grad is None or (grad.shape, grad.dtype, grad.device) != (weight.shape, weight.dtype, weight.device):
            found = "None" if grad is None else f"{grad.dtype} {list(grad.shape)} on {grad.device}"
            raise InvalidInput(
                f"gradient {index} is {found}; its weight is {weight.dtype} {list(weight.shape)} on {weight.device}."
            )


def check_span(span: HeadSpan, index: int, heads: int, features: int) -> None:
    last = span.start + (span.heads - 1) * span.stride
    low, high = min(span.start, last), max(span.start, last) + span.width
    if span.heads < 0 or span.width < 0 or not 0 <= span.head <= span.head + span.heads <= heads:
        raise InvalidInput(f"projection {index} has {heads} heads; {span} does not fit them.")
    if span.heads and span.width and not 0 <= low < high <= features:
        raise InvalidInput(f"projection {index} has {features} features along its heads; {span} reaches {low} to {high}.")
