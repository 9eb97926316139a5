"""The copy that surgery is gives what index_select gives."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headprune.surgery.gather import LARGE, block_of, fresh, gathered


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_it_is_index_select(data):
    dim, width = data.draw(st.integers(0, 2)), data.draw(st.sampled_from([1, 2, 3, 8]))
    shape = data.draw(st.lists(st.integers(1, 5), min_size=3, max_size=3))
    shape[dim] *= width
    heads = sorted(data.draw(st.sets(st.integers(0, shape[dim] // width - 1))))
    entries = (torch.tensor(heads, dtype=torch.long)[:, None] * width + torch.arange(width)).flatten()
    tensor = torch.randn(shape).to(data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.int64])))
    for laid_out in (tensor, tensor.transpose(0, 2).contiguous().transpose(0, 2)):
        found = gathered(laid_out, dim, entries)
        assert torch.equal(found, tensor.index_select(dim, entries))
        assert found.is_contiguous()


@pytest.mark.parametrize(
    ("entries", "length", "block"), [([0, 1, 2, 3], 8, 4), ([4, 5, 6, 7, 10, 11], 12, 2), ([1, 2, 3, 4], 8, 1), ([3], 4, 1)]
)
def test_blocks_are_as_long_as_the_runs_allow(entries, length, block):
    assert block_of(torch.tensor(entries), length) == block


def test_large_memory_is_ordinary_memory():
    found = fresh([3, LARGE], torch.uint8).fill_(2)
    assert found.sum() == 6 * LARGE
