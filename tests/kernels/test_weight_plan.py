"""The chunks of weights that kernels read: every element of every head once, and no other."""

import pytest
import torch
from weight_cases import weight_call

from headprune.kernels.weight_plan import CHUNK_ELEMENTS, Matrix, chunk_plan, matrices_of, row_length
from headprune.ops.weight_slices import WeightCall

CPU = torch.device("cpu")


def read_by(plan, tensors: int) -> list[dict[int, int]]:
    """For each tensor: element -> head, from the chunks; an element read twice is an error."""
    found = [{} for _ in range(tensors)]
    for tensor, offset, count, columns, stride, _, head in plan.table.tolist():
        for element in range(count):
            at = offset + element // columns * stride + element % columns
            assert at not in found[tensor], "read twice"
            found[tensor][at] = head
    return found


def owned_by(call: WeightCall) -> list[dict[int, int]]:
    found = [{} for _ in call.weights]
    for tensor, head, heads, start, stride, width in call.spans:
        weight, dim = call.weights[tensor], call.dims[tensor]
        for feature in range(heads * width):
            at = (start + feature // width * stride + feature % width) * weight.stride(dim)
            for other in range(weight.shape[1 - dim]):
                found[tensor][at + other * weight.stride(1 - dim)] = head + feature // width
    return found


def test_every_element_of_every_head_is_read_once():
    call = weight_call(torch.float32, False).readable()
    matrices = matrices_of(call.weights, call.dims)
    plan = chunk_plan(matrices, call.spans, call.heads, row_length(matrices, call.spans), CPU)
    assert read_by(plan, len(call.weights)) == owned_by(call)


def test_a_head_s_slots_are_neighbours_and_all_different():
    plan = chunk_plan((Matrix((4000, 256), (256, 1), 1),), ((0, 0, 4, 0, 64, 64),), 4, 64, CPU)
    slots, heads = plan.table[:, 5], plan.table[:, 6]
    assert sorted(slots.tolist()) == list(range(len(slots)))
    for head in range(4):
        first, stop = plan.offsets[head : head + 2].tolist()
        assert sorted(slots[heads == head].tolist()) == list(range(first, stop))
    assert plan.table[:, 2].max() <= CHUNK_ELEMENTS
    assert plan.table[:8, 6].tolist() == [0, 1, 2, 3, 0, 1, 2, 3]


@pytest.mark.parametrize(
    ("matrix", "span", "whole"),
    [
        (Matrix((4096, 4096), (4096, 1), 1), (0, 0, 32, 0, 128, 128), 16),
        (Matrix((1024, 4096), (4096, 1), 0), (0, 0, 8, 0, 128, 128), 16),
        (Matrix((4096, 40), (40, 1), 1), (0, 0, 5, 0, 8, 8), 8),
        (Matrix((4096, 36), (36, 1), 1), (0, 0, 3, 0, 12, 12), 4),
        (Matrix((24, 33), (33, 1), 0), (0, 0, 3, 0, 8, 8), 8),
        (Matrix((15, 33), (33, 1), 0), (0, 0, 5, 0, 3, 3), 1),
    ],
)
def test_whole_divides_all_that_a_program_reads(matrix, span, whole):
    assert chunk_plan((matrix,), (span,), span[2], row_length((matrix,), (span,)), CPU).whole == whole
