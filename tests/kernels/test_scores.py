"""The arithmetic around the kernels; the device functions are checked through the operators."""

import pytest

pytest.importorskip("triton", reason="Triton is not installed")
from headprune.kernels.scores import split_dim


def test_two_tiles_of_a_power_of_two_cover_every_head_dim():
    for dim in range(1, 257):
        first, second = split_dim(dim)
        assert all(width == 0 or (width >= 16 and width & (width - 1) == 0) for width in (first, second))
        assert second < first
        assert dim <= first + second < dim + max(16, dim / 2)


def test_common_head_dims_are_not_padded():
    assert all(sum(split_dim(dim)) == dim for dim in (16, 32, 48, 64, 80, 96, 128, 144, 160, 192, 256))
