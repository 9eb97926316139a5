"""Peak memory of what is known to take so much."""

import pytest
import torch

from headprune.evaluation.memory import peak_bytes


def one_after_the_other() -> None:
    for _ in range(3):
        torch.ones(1 << 20)


def both_at_once() -> None:
    kept = torch.ones(1 << 20)
    torch.ones(1 << 19)
    del kept


@pytest.mark.parametrize(("run", "megabytes"), [(one_after_the_other, 4), (both_at_once, 6), (lambda: None, 0)])
def test_the_peak_is_of_tensors_alive_at_once(run, megabytes):
    assert peak_bytes(run) == pytest.approx(megabytes << 20, abs=1 << 16)


def test_nothing_is_written_beside_the_number(capfd):
    peak_bytes(both_at_once)
    assert capfd.readouterr() == ("", "")
