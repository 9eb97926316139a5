"""Statistics of each head's attention pattern in the warp-specialised forward for Hopper (Gluon functions).

The sums that entropy and distance need are kept like the softmax's own sum: 8 per row, each within one thread, so that an element
costs two fused multiply-adds more. The keys of a block lie in groups of 8; within one sum only the group's number changes, so that
a distance is one factor per group and two numbers per sum. What is left is done once per tile of rows. Every warp writes the sums
over its 16 rows in the fields of head_statistics.py, whose second kernel adds them up.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

ROWS = gl.constexpr(64)  # of one consumer
WARP_ROWS = gl.constexpr(16)
LN2 = gl.constexpr(0.6931471805599453)


@gluon.jit
def block_patterns(p, x, sums, rows, start, offset, SIDE: gl.constexpr):
    """(sum of p * x, sum of p * |query's position - key's|) over one block of keys, each [ROWS, 8].

    p [ROWS, BLOCK_N]: exponentials, 0 where masked; x: their base-2 logarithms, finite. sums [ROWS, 8]: the sums of p. The
    positions of `rows` are those of the keys minus `offset`. SIDE: 1 where no unmasked key of the block is before a query of
    `rows`, -1 where none is behind one, 0 where both may be.
    """
    BLOCK_N: gl.constexpr = p.shape[1]
    SUM: gl.constexpr = sums.type.layout
    p = p.reshape([ROWS, BLOCK_N // 8, 8])
    x = x.reshape([ROWS, BLOCK_N // 8, 8])
    group = gl.arange(0, BLOCK_N // 8, gl.SliceLayout(0, gl.SliceLayout(2, p.type.layout)))
    group = (group * 8).to(gl.float32)[None, :][:, :, None]
    own = gl.convert_layout(rows, gl.SliceLayout(1, SUM), assert_trivial=True) + offset
    ahead = (start + gl.arange(0, 8, gl.SliceLayout(0, SUM))[None, :] - own[:, None]).to(gl.float32)
    if SIDE == 0:
        distance = gl.sum(p * gl.abs(ahead[:, None, :] + group), 1)
    else:
        distance = (ahead * sums + gl.sum(p * group, 1)) * SIDE
    return gl.sum(p * x, 1), distance


@gluon.jit
def sides(first, count, offset, BLOCK_N: gl.constexpr):
    """Of the steps 0 .. count through the key blocks, last block first: (the first step whose keys are not all behind the ROWS
    queries from `first` on, the first one whose keys are all before them); no less than 1."""
    own = first + offset
    behind = own + ROWS - 1 if own + ROWS > 1 else 0
    before = own if own > 0 else 0
    middle = count - (behind + BLOCK_N - 1) // BLOCK_N
    middle = middle if middle > 1 else 1
    rest = count - before // BLOCK_N
    return middle, rest if rest > middle else middle


@gluon.jit
def first_score(q, k_ptr, DIM: gl.constexpr, ROW: gl.constexpr):
    """q k of the key at k_ptr [ROWS]. q: the tile in shared memory; a warp takes its own 16 rows, so that nothing is exchanged."""
    layout: gl.constexpr = gl.BlockedLayout([DIM // 16, 8], [256 // DIM, DIM // 8], [4, 1], [1, 0])
    key = gl.load(k_ptr + gl.arange(0, DIM, gl.SliceLayout(0, layout))).to(gl.float32)
    return gl.convert_layout(gl.sum(q.load(layout).to(gl.float32) * key[None, :], 1), ROW)


@gluon.jit
def store_warps(ptr, counted, values):
    """The sum over each warp's counted rows."""
    sums = gl.sum(gl.where(counted, values, 0.0).reshape([ROWS // WARP_ROWS, WARP_ROWS]), 1)
    gl.store(ptr + gl.arange(0, ROWS // WARP_ROWS, sums.type.layout), sums)


@gluon.jit
def store_patterns(ptr, plane, counted, m_i, total, first_mass, e_i, d_i, norm):
    """The seven fields of a consumer's rows, `plane` apart; all arguments [ROWS], m_i in base 2."""
    store_warps(ptr, counted, (gl.log2(total) - e_i / total) * LN2)
    top = gl.max(gl.where(counted, m_i * LN2, float("-inf")).reshape([ROWS // WARP_ROWS, WARP_ROWS]), 1)
    gl.store(ptr + plane + gl.arange(0, ROWS // WARP_ROWS, top.type.layout), top)
    store_warps(ptr + 2 * plane, counted, 1.0 / total)
    store_warps(ptr + 3 * plane, counted, first_mass)
    store_warps(ptr + 4 * plane, counted, d_i / total)
    store_warps(ptr + 5 * plane, counted, norm)
    store_warps(ptr + 6 * plane, counted, gl.where(counted, 1.0, 0.0))


@gluon.jit
def store_no_patterns(ptr, plane, layout: gl.constexpr):
    """What a consumer writes for rows of which none counts."""
    warps = gl.arange(0, ROWS // WARP_ROWS, layout)
    for field in gl.static_range(7):
        gl.store(
            ptr + field * plane + warps, gl.full([ROWS // WARP_ROWS], float("-inf") if field == 1 else 0.0, gl.float32, layout)
        )
