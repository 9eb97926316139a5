"""Weight statistics in C++ against the reference in fp64."""

import pytest
import torch
from weight_cases import assert_exact, weight_call

from headprune.ops.cpp import head_weight_stats, missing_weights, refuses_weights
from headprune.ops.weight_slices import HeadSlices, WeightCall

pytestmark = pytest.mark.skipif(missing_weights() is not None, reason=str(missing_weights()))
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("grads", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_layout_is_as_exact_as_pytorch(dtype, grads):
    call = weight_call(dtype, grads)
    assert_exact(head_weight_stats(call), call)


def test_sums_over_many_pieces_stay_exact():
    torch.manual_seed(0)
    weights = [torch.rand(2 * 700, 601), torch.rand(2100, 300)]
    slices = [HeadSlices.contiguous(weights[0], 2, 700), HeadSlices.contiguous(weights[1], 3, 100, dim=1)]
    call = WeightCall.of(slices, [torch.randn_like(weight) for weight in weights])
    assert_exact(head_weight_stats(call), call)


def test_results_do_not_depend_on_the_number_of_threads():
    call = weight_call(torch.float32, True)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = head_weight_stats(call)
        torch.set_num_threads(3)
        assert all(torch.equal(head_weight_stats(call), one) for _ in range(3))
    finally:
        torch.set_num_threads(threads)


def test_nothing_is_read_beyond_a_head_s_own_weights():
    weight = torch.full((9, 64), float("nan"))
    weight[:, 16:33] = 1.0
    slices = [HeadSlices.contiguous(weight, 1, 17, dim=1, start=16)]
    assert head_weight_stats(WeightCall.of(slices, []))[:, 0].tolist() == [9 * 17, 9 * 17, 1.0]


def test_fp64_is_refused():
    assert "fp32, bf16 and fp16" in refuses_weights(weight_call(torch.float64, False))
