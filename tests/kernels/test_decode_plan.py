"""How decode is cut into pieces: nothing left out, nothing twice, and no more pieces than pay."""

import pytest
import torch

from headprune.head_map import HeadMap
from headprune.kernels.decode_plan import LEAST_KEYS, MOST_SPLITS, most_rows, split_count, tile_table

MAPS = [HeadMap((0, 0, 0, 2, 3, 3), 4), HeadMap.uniform(40, 1), HeadMap.uniform(5), HeadMap((), 0)]


@pytest.mark.parametrize("head_map", MAPS, ids=str)
@pytest.mark.parametrize("new", [1, 3, 8])
def test_tiles_hold_every_row_once_and_rows_of_one_group_only(head_map, new):
    table = tile_table(head_map.group_offsets, new, 16, torch.device("cpu"))
    assert table.dtype == torch.int32
    rows = [(row, kv_head) for kv_head, first, stop in table.tolist() for row in range(first, stop)]
    assert rows == [(row, head_map.kv_of_query[row // new]) for row in range(head_map.query_heads * new)]
    assert all(0 < stop - first <= 16 for _, first, stop in table.tolist())
    assert most_rows(head_map.group_offsets, new) == new * max(head_map.group_sizes, default=0)


@pytest.mark.parametrize(
    ("programs", "capacity"), [(1, 1), (8, 4096), (8, 2**20), (64, 2**17), (512, 4096), (10**6, 2**17), (0, 0)]
)
def test_splits_fill_the_gpu_but_are_never_tiny(programs, capacity):
    splits = split_count(programs, capacity, slots=264)
    assert 1 <= splits <= MOST_SPLITS
    assert splits == 1 or capacity // splits >= LEAST_KEYS
    assert splits == 1 or splits * programs <= 4 * 264


def test_one_long_sample_still_fills_the_gpu():
    assert 8 * split_count(8, 2**17, slots=264) >= 0.9 * 264
