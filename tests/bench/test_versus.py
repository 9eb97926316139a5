"""The benchmark harness: what a row says must follow from what was measured."""

import pytest
import torch
import versus
from versus import Ceilings, compare, measure


@pytest.fixture
def taking(monkeypatch):
    """`taking(milliseconds)` gives a function that moves the harness's clock on by that much."""
    now = [0.0]
    monkeypatch.setattr(versus.time, "perf_counter", lambda: now[0])

    def function(milliseconds: float):
        return lambda: now.__setitem__(0, now[0] + milliseconds / 1000)

    return function


def test_the_fastest_peer_that_runs_is_the_one_compared_with(taking):
    def broken():
        raise RuntimeError("no kernel\nfor this")

    row = compare("row", taking(1), {"slow": taking(40), "fast": taking(15), "broken": broken}, at_least=2.0, rounds=3)
    assert row.peer == "fast"
    assert row.ratio == pytest.approx(15)
    assert row.met is True
    assert row.others["broken"] == "RuntimeError: no kernel for this"
    assert "slow" in row.others


def test_a_missed_goal_is_said(taking):
    assert compare("row", taking(30), {"peer": taking(1)}, at_least=1.0, rounds=3).met is False
    assert compare("row", taking(30), {"peer": taking(1)}, at_most=1.1, rounds=3).met is False
    assert compare("row", taking(1), {"peer": taking(1)}, rounds=3).met is None


def test_the_floor_is_the_larger_of_arithmetic_and_bytes(taking):
    ceilings = Ceilings(gflops=1000.0, gbytes=10.0)
    row = compare("row", taking(20), {"peer": taking(20)}, gflop=1.0, gbyte=0.1, ceilings=ceilings, of_floor=0.4, rounds=3)
    assert (row.floor, row.floor_us) == ("bytes", pytest.approx(10_000))
    assert row.met is True


def test_ours_must_run():
    with pytest.raises(ZeroDivisionError):
        measure({"ours": lambda: 1 / 0}, torch.device("cpu"), 3)


def test_every_other_round_goes_the_other_way_round():
    ran = []
    measure({name: lambda name=name: ran.append(name) for name in ("ours", "peer", "other")}, torch.device("cpu"), 3)
    forth, back = ["ours", "peer", "other"], ["other", "peer", "ours"]
    assert ran[6:] == [*forth, *back, *forth]  # behind two calls of each to warm up
    assert ran[:6] == [name for name in forth for _ in range(2)]


def test_what_no_cuda_graph_could_capture_is_told(monkeypatch):
    monkeypatch.setattr(versus.torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(versus.torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(versus, "captured", lambda function, calls: None if function is torch.seed else lambda: None)
    functions = {"ours": lambda: None, "peer": torch.seed}
    assert measure(functions, torch.device("cuda"), 2)[1:] == ({}, ["peer"])
    assert measure(functions, torch.device("cuda"), 2, graphs=False)[1:] == ({}, [])
