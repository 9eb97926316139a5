"""Which decode kernel is the faster one, by shape, from bench/bench_gpu_decode.py.

On an H200 Triton is, in all 30 rows (head_dim 128, groups of 1, 8 and ragged ones, 4k to 128k keys): CUDA takes 1.01 to 1.53 times
as long. So the table is empty.
"""

from __future__ import annotations

from headprune.ops.call import DecodeCall

# (head_dim, rows of the largest group up to): the backend that bench/bench_gpu_decode.py found faster.
FASTER: dict[tuple[int, int], str] = {}


def faster_backend(call: DecodeCall) -> str:
    """ "cuda" or "triton". The first entry of the call's head_dim that holds the rows of its largest group decides."""
    rows = call.new * max(call.head_map.group_sizes, default=0)
    for (head_dim, most), backend in sorted(FASTER.items()):
        if head_dim == call.query.shape[3] and rows <= most:
            return backend
    return "triton"
