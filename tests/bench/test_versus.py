"""The benchmark harness: what a row says must follow from what was measured."""

import time

import pytest
import torch
from versus import Ceilings, compare, measure


def slept(milliseconds: float):
    return lambda: time.sleep(milliseconds / 1000)


def test_the_fastest_peer_that_runs_is_the_one_compared_with():
    def broken():
        raise RuntimeError("no kernel\nfor this")

    row = compare("row", slept(1), {"slow": slept(40), "fast": slept(15), "broken": broken}, at_least=2.0, rounds=3)
    assert row.peer == "fast"
    assert row.ratio == row.peer_us / row.ours_us
    assert row.met is True
    assert row.others["broken"] == "RuntimeError: no kernel for this"
    assert "slow" in row.others


def test_a_missed_goal_is_said():
    assert compare("row", slept(30), {"peer": slept(1)}, at_least=1.0, rounds=3).met is False
    assert compare("row", slept(30), {"peer": slept(1)}, at_most=1.1, rounds=3).met is False
    assert compare("row", slept(1), {"peer": slept(1)}, rounds=3).met is None


def test_the_floor_is_the_larger_of_arithmetic_and_bytes():
    ceilings = Ceilings(gflops=1000.0, gbytes=10.0)
    row = compare("row", slept(20), {"peer": slept(20)}, gflop=1.0, gbyte=0.1, ceilings=ceilings, of_floor=0.1, rounds=3)
    assert (row.floor, row.floor_us) == ("bytes", pytest.approx(10_000))
    assert row.met is True


def test_ours_must_run():
    with pytest.raises(ZeroDivisionError):
        measure({"ours": lambda: 1 / 0}, torch.device("cpu"), 3)
