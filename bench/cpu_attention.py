"""Forward attention on the CPU: ours against torch SDPA, interleaved medians.

    python bench/cpu_attention.py [--json results.json] [--threads 2] [--only decode]

"floor" is the time that the counted floating-point work would take at the fp32 FMA rate given by --peak (GFLOP/s, all
threads; measure it on the machine). Each row names its goal, the wanted peer / ours.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.nn.functional import scaled_dot_product_attention

from headprune import HeadMap
from headprune.ops import attention
from headprune.ops.extension import cpu_extension

RAGGED = (5, 2, 4, 1, 3, 2, 6, 1)  # 24 query heads over 8 key/value heads


@dataclass(frozen=True)
class Case:
    name: str
    ours: Callable[[], object]
    peer: Callable[[], object]
    gflop: float
    goal: float
    repeats: int


@dataclass(frozen=True)
class Row:
    name: str
    ours_us: float
    peer_us: float
    ratio: float
    goal: float
    gflops: float
    floor_us: float


def tokens(batch: int, length: int, heads: int, dim: int) -> torch.Tensor:
    """[batch, heads, length, dim] as a projection leaves it: token by token."""
    return torch.randn(batch, length, heads, dim).transpose(1, 2)


def encoder(length: int, dim: int, batch: int = 8, heads: int = 12) -> Case:
    query, key, value = (tokens(batch, length, heads, dim) for _ in range(3))
    head_map = HeadMap.uniform(heads)
    return Case(
        f"encoder {heads} heads d{dim} S{length} batch {batch}",
        lambda: attention(query, key, value, head_map),
        lambda: scaled_dot_product_attention(query, key, value),
        4 * batch * heads * length * length * dim / 1e9,
        1.3 if length <= 128 else 1.0,
        30 if length <= 256 else 9,
    )


def decoder(length: int, dim: int = 128, heads: int = 32, kv_heads: int = 8) -> Case:
    query, key, value = (tokens(1, length, count, dim) for count in (heads, kv_heads, kv_heads))
    head_map = HeadMap.uniform(heads, kv_heads)
    return Case(
        f"decoder {heads}/{kv_heads} heads d{dim} S{length} causal",
        lambda: attention(query, key, value, head_map, causal=True),
        lambda: scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True),
        2 * heads * length * length * dim / 1e9,
        1.0,
        7,
    )


def ragged(length: int, dim: int = 128, batch: int = 1) -> Case:
    head_map = HeadMap(tuple(kv for kv, size in enumerate(RAGGED) for _ in range(size)), len(RAGGED))
    query, key, value = (tokens(batch, length, count, dim) for count in (sum(RAGGED), len(RAGGED), len(RAGGED)))
    groups = torch.tensor(head_map.kv_of_query)

    def expand() -> torch.Tensor:
        return scaled_dot_product_attention(query, key.index_select(1, groups), value.index_select(1, groups), is_causal=True)

    return Case(
        f"ragged 24/8 heads d{dim} S{length} causal vs expand + SDPA",
        lambda: attention(query, key, value, head_map, causal=True),
        expand,
        2 * batch * sum(RAGGED) * length * length * dim / 1e9,
        1.3,
        9,
    )


def cases() -> Iterator[Case]:
    for length in (64, 128, 256, 512):
        for dim in (32, 64):
            yield encoder(length, dim)
    for length in (1024, 2048):
        yield decoder(length)
    for length in (512, 1024):
        yield ragged(length)


def measure(case: Case, peak: float) -> Row:
    """Medians of runs that take turns, after two of each to warm up."""
    times: tuple[list[float], list[float]] = ([], [])
    for run in range(case.repeats + 2):
        for side, function in enumerate((case.ours, case.peer)):
            start = time.perf_counter()
            function()
            if run >= 2:
                times[side].append(time.perf_counter() - start)
    ours, peer = (statistics.median(side) for side in times)
    return Row(case.name, ours * 1e6, peer * 1e6, peer / ours, case.goal, case.gflop / ours, case.gflop / peak * 1e6)


def table_line(row: Row) -> str:
    times = f"{row.ours_us:10.0f}{row.peer_us:10.0f}{row.ratio:7.2f}{row.goal:6.1f}"
    return f"{row.name:58}{times}{row.gflops:9.0f}{row.floor_us:10.0f}{'' if row.ratio >= row.goal else '  below goal'}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--peak", type=float, default=225.0, help="GFLOP/s of fp32 FMA on all threads, for the floor")
    parser.add_argument("--only", default="", help="run the rows whose name contains this")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    machine = {
        "processor": processor(),
        "threads": args.threads,
        "torch": torch.__version__,
        "library": cpu_extension().instruction_set,
        "peak_gflops": args.peak,
    }
    print("  ".join(f"{name} {value}" for name, value in machine.items()))
    print(f"{'':58}{'ours us':>10}{'peer us':>10}{'ratio':>7}{'goal':>6}{'GFLOP/s':>9}{'floor us':>10}")
    rows = []
    with torch.no_grad():
        for case in cases():
            if args.only in case.name:
                row = measure(case, args.peak)
                rows.append(asdict(row))
                figures = (
                    f"{row.ours_us:10.0f}{row.peer_us:10.0f}{row.ratio:7.2f}{row.goal:6.1f}{row.gflops:9.0f}{row.floor_us:10.0f}"
                )
                print(f"{row.name:58}{figures}{'' if row.ratio >= row.goal else '  below goal'}", flush=True)
    if args.json:
        args.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")


def processor() -> str:
    """The processor's name and number of cores."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
        return f"{names[0]} ({len(names)} cores)"
    except (OSError, IndexError):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
