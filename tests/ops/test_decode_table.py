"""The table that chooses between the decode kernels."""

import torch
from decode_cases import CASES, build

from headprune.ops import cuda, decode_table
from headprune.ops.decode_table import faster_backend


def test_nothing_is_preferred_to_triton_where_nothing_was_faster():
    assert decode_table.FASTER == {}
    assert faster_backend(build(CASES["one head"], torch.float16).call) == "triton"


def test_the_first_entry_that_holds_the_largest_group_decides(monkeypatch):
    monkeypatch.setattr(decode_table, "FASTER", {(64, 8): "cuda", (64, 64): "triton", (128, 64): "cuda"})
    assert faster_backend(build(CASES["ragged, lengths 0 and 1"], torch.float16).call) == "cuda"  # 3 heads, 2 new tokens
    assert faster_backend(build(CASES["groups of 17 and 33"], torch.float16).call) == "triton"
    assert faster_backend(build(CASES["wide heads by token"], torch.float16).call) == "triton"


def test_a_backend_that_is_not_preferred_says_so(monkeypatch):
    monkeypatch.setattr(cuda, "refuses", lambda call: None)
    assert "decode_table.py" in cuda.slower(build(CASES["one head"], torch.float16).call)
