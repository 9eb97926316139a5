"""Ours against named peers in the same run: interleaved rounds, medians, the ratio and the floor.

A benchmark is a pytest function that calls the `versus` fixture (conftest.py) once per row.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from headprune.evaluation.memory import peak_bytes

GPU_ROUND_SECONDS = 4e-3  # calls are repeated until one timed round on a GPU lasts about this long
MOST_CALLS = 200
SLOW_SECONDS = 0.5  # a call this long needs no graph, and one call before it to warm up
ROUNDS = 15
CPU_SECONDS = 1.5  # short calls are moved most by what else runs, so that they get more rounds


@dataclass(frozen=True)
class Row:
    """One row of the table. Times are medians per call in microseconds; ratio is peer / ours."""

    name: str
    ours_us: float
    spread: float  # (third quartile - first quartile) / median of ours
    peer: str
    peer_us: float
    ratio: float
    goal: str
    met: bool | None  # None: no goal
    floor_us: float | None = None
    floor: str = ""  # what the floor counts
    others: dict[str, str] = field(default_factory=dict)  # other peers: microseconds, or why they did not run
    launched: list[str] = field(default_factory=list)  # whose time has launches from Python in it: no CUDA graph could capture them
    peak_mb: dict[str, float] | None = None  # of ours and each peer: tensors alive at once, above those before the call


@dataclass(frozen=True)
class Ceilings:
    """What this machine reaches in plain library calls: the floors are counted against these."""

    gflops: float  # of a large matrix product in the row's dtype
    gbytes: float  # bytes read + written a second: a large copy on a GPU, a large read on a CPU


def measure(
    run: Mapping[str, Callable[[], object]],
    device: torch.device,
    rounds: int | None,
    graphs: bool = True,
    before: Callable[[], object] = lambda: None,
) -> tuple[dict[str, list[float]], dict[str, str], list[str]]:
    """(seconds per call of every round, why a peer did not run, what no CUDA graph could capture though `graphs` asks for it).

    The first of `run` is ours and must run. Every other round goes the other way round: none always runs behind the same one.
    """
    prepared, failed, launched = {}, {}, []
    for name, function in run.items():
        try:
            timed, calls, in_a_graph = prepare(function, device, graphs)
        except Exception as error:
            if not prepared:
                raise
            failed[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
            continue
        prepared[name] = timed, calls
        if graphs and not in_a_graph:
            launched.append(name)
    times: dict[str, list[float]] = {name: [] for name in prepared}
    gc.collect()
    until = time.perf_counter() + (CPU_SECONDS if rounds is None and device.type == "cpu" else 0.0)
    done = 0
    while done < (rounds or ROUNDS) or time.perf_counter() < until:
        done += 1
        for name, (timed, calls) in [*prepared.items()][:: 1 if done % 2 else -1]:
            before()
            start = time.perf_counter()
            timed()
            times[name].append((time.perf_counter() - start) / calls)
    prepared.clear()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return times, failed, launched


def prepare(function: Callable[[], object], device: torch.device, graphs: bool) -> tuple[Callable[[], object], int, bool]:
    """(what one round runs, how many calls of `function` that is, whether launches from Python count for nothing), warmed up; what
    takes long is run fewer times for that."""
    function()
    if device.type != "cuda":
        function()
        return function, 1, True

    def seconds() -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        torch.cuda.synchronize()
        return time.perf_counter() - start

    took = seconds()
    if took > SLOW_SECONDS:
        return (lambda: (function(), torch.cuda.synchronize())), 1, True
    calls = max(1, min(MOST_CALLS, math.ceil(GPU_ROUND_SECONDS / seconds())))
    graph = captured(function, calls) if graphs else None
    replay = graph or (lambda: [function() for _ in range(calls)])

    def timed() -> None:
        replay()
        torch.cuda.synchronize()

    timed()
    return timed, calls, graph is not None


def captured(function: Callable[[], object], calls: int) -> Callable[[], None] | None:
    """A CUDA graph of `calls` calls, so that launches from Python do not count; None where it cannot be captured."""
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(calls):
                function()
    except Exception:
        torch.cuda.synchronize()
        # Left as it is, the generator believes that it is being captured, and no random number is drawn any more.
        generator = torch.cuda.default_generators[torch.cuda.current_device()]
        generator.graphsafe_set_state(torch.Generator("cuda").graphsafe_get_state())
        return None
    return graph.replay


def compare(
    name: str,
    ours: Callable[[], object],
    peers: Mapping[str, Callable[[], object]],
    *,
    device: torch.device | str = "cpu",
    at_least: float | None = None,
    at_most: float | None = None,
    of_floor: float | None = None,
    gflop: float = 0.0,
    gbyte: float = 0.0,
    ceilings: Ceilings | None = None,
    reads: Callable[[], object] | None = None,
    rounds: int | None = None,
    memory: bool = False,
    graphs: bool = True,
    before: Callable[[], object] = lambda: None,
) -> Row:
    """Measures one row.

    Args:
        ours, peers: functions without arguments; the fastest peer that runs is the one compared with.
        at_least: goal for peer time / our time ("1.3 times as fast").
        at_most: goal for our time / peer time ("at most 1.10 times as long").
        of_floor: goal for floor time / our time ("85 % of the copy bandwidth").
        gflop, gbyte: what the call must compute and move at least; the larger of their times at `ceilings` is the floor.
        reads: a plain library call that reads as many bytes; timed in the same rounds, its time is a floor too. For machines
            whose bandwidth is shared and changes from minute to minute.
        rounds: exactly so many; default: ROUNDS, on a CPU more until CPU_SECONDS are over.
        memory: measure the peak memory of one call of each too.
        graphs: replay CUDA graphs where they can be captured; not for calls that copy to the host.
        before: called, untimed, before each round of each: what both need to start from.
    """
    floor_run = {"reads": reads} if reads else {}
    times, failed, launched = measure({"ours": ours, **peers, **floor_run}, torch.device(device), rounds, graphs, before)
    ran = {name: function for name, function in {"ours": ours, **peers}.items() if name in times}
    peaks = {name: peak_bytes(function, device) / 1e6 for name, function in ran.items()} if memory else None
    medians = {peer: statistics.median(values) * 1e6 for peer, values in times.items()}
    ours_us, read_us = medians.pop("ours"), medians.pop("reads", math.nan)
    peer = min(medians, key=medians.__getitem__) if medians else ""
    peer_us = medians.get(peer, math.nan)
    low, _, high = statistics.quantiles(times["ours"], n=4)
    floors = {}
    if reads:
        floors["bytes read"] = read_us
    if ceilings and gflop:
        floors["arithmetic"] = gflop / ceilings.gflops * 1e6
    if ceilings and gbyte:
        floors["bytes"] = gbyte / ceilings.gbytes * 1e6
    floor = max(floors, key=floors.__getitem__) if floors else ""
    goals = []
    if at_least is not None:
        goals.append((f">= {at_least:g}x {peer or 'a peer'}", peer_us / ours_us >= at_least))
    if at_most is not None:
        goals.append((f"<= {at_most:.3g} of {peer}", ours_us / peer_us <= at_most))
    if of_floor is not None and floor:
        goals.append((f">= {of_floor:.0%} of the floor", floors[floor] / ours_us >= of_floor))
    others = {other: f"{value:.1f}" for other, value in medians.items() if other != peer} | failed
    return Row(
        name, ours_us, (high - low) * 1e6 / ours_us, peer, peer_us, peer_us / ours_us, ", ".join(goal for goal, _ in goals),
        all(met for _, met in goals) if goals else None, floors.get(floor), floor, others, launched, peaks,
    )  # fmt: skip
