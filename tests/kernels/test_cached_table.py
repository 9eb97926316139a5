"""Tables that kernels read: forgotten by and by, unless a CUDA graph holds on to them."""

import gc
import weakref

import torch

from headprune.kernels.cached_table import cached_table


@cached_table(2)
def table(number: int) -> torch.Tensor:
    return torch.tensor([number])


def forgotten(number: int) -> bool:
    first = weakref.ref(table(number))
    for other in range(10, 13):
        table(other)
    gc.collect()
    return first() is None


def test_a_table_is_made_once_and_forgotten_when_others_came():
    assert table(1) is table(1)
    assert forgotten(1)


def test_a_table_of_a_captured_graph_is_never_forgotten(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("headprune.kernels.cached_table.capturing", lambda: True)
        table(2)
    assert not forgotten(2)
