"""Flash attention forward for Hopper (sm_90), warp-specialised in Gluon: one warp loads, two or three warpgroups compute.

Names as in the papers: q, k, v, o; s = q k^T, p its exponential, m_i and l_i the running maximum and sum of the online softmax
(base 2), lse its natural logarithm. The schedule is FlashAttention-3's (Shah et al. 2024, sections 3.1 and 3.2):

- The producer copies q, k and v tiles with TMA into rings of buffers. Each consumer owns 64 rows of the tile. It issues
  s[j+1] = q k[j+1]^T and o += p[j] v[j] together, and computes the softmax of s[j+1] while the tensor cores still work on o.
- Consumers take turns (`turns`): one issues its products when the other has issued its own, so that one's softmax runs under
  the other's products.
- Key blocks are visited from the last to the first: only the first ones visited need a mask.

The barrier protocol. A ring of n buffers has barriers full[n] and empty[n]; the c-th item lies in slot c % n, and c counts on
from tile to tile, the same in every warp, because all derive it from the same tile sizes.

    full[s]    1 arrival + the bytes of the copy. The producer arrives and starts the copy; consumers wait before reading.
    empty[s]   k, v: one arrival per consumer; q: 1, because every consumer has its own q slots. Consumers arrive when their
               products that read the slot are complete (q: when the output that took its place has been copied out, which
               they ask only after the first product of the next tile, so that the copy costs them nothing);
               the producer waits before writing. Item c waits for completion number c // n - 1 of its slot: none for c < n.
    turns[w]   1 arrival, by the consumer before w (cyclically), after each of its issues. Consumer w waits before each.
               Issue i of consumer 0 needs i completions, issue i of the others i + 1: the order 0, 1, 2, 0, 1, 2, ... .

A waiter is never more than one phase behind the barrier it waits on: full[s] cannot complete again before the waiter itself has
arrived on empty[s], nor empty[s] before the producer, the only one who waits on it, has refilled the slot; turns[w] not before w
has passed the turn on. So one bit of phase suffices. There is no deadlock: all warps handle the items in one order
(k[0], q, then k[j+1], v[j], ..., v[last]); the producer waits only for items that lie STAGES back, which consumers release
without waiting for anything that comes later in the order than what the producer has already started, provided STAGES >= 2
(a consumer waits for v[j] before it releases v[j-1]) and Q_STAGES >= 2 (it waits for the next tile's q before it releases q); and
the holder of a turn waits for nothing at all.
tests/kernels/test_hopper_schedule.py runs these functions on a model of the barriers.

Sources: the schedule, and 240 and 24 registers for consumers and producer, from FlashAttention-3; what Gluon's barriers and
fences promise, from triton-lang/triton, python/tutorials/gluon/08-warp-specialization.py; turns with named barriers, which Gluon
does not have, in facebookexperimental/triton, third_party/tlx/tutorials/hopper_fa_ws_pipelined_pingpong.py.
"""

# ruff: noqa: RUF059, RUF005  (Gluon passes groups of values as tuples, taken apart whole; it knows no starred lists)

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from headprune.kernels.hopper_schedule import filled_phase, freed_phase, key_blocks, paired, slot, turn_phase
from headprune.kernels.hopper_statistics import (
    LN2,
    ROWS,
    WARP_ROWS,
    block_patterns,
    first_score,
    sides,
    store_no_patterns,
    store_patterns,
)

# Triton 3.9 renamed the two copies.
copy_in = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
copy_out = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global


@gluon.jit
def turns_of(schedule):
    """How often every persistent program asks `place_of` for a tile."""
    table_ptr, rounds, rest = schedule
    return 2 * rounds + rest


@gluon.jit
def place_of(turn, schedule, row_blocks):
    """(sample * heads + head, block of rows) of this program's tile in its turn-th turn; block -1: none."""
    table_ptr, rounds, rest = schedule
    program = gl.program_id(0)
    place, block = paired(program, turn, gl.num_programs(0), row_blocks)
    if turn >= 2 * rounds:
        tile = gl.load(table_ptr + (program * rest + turn - 2 * rounds))
        place = tile // row_blocks
        block = tile % row_blocks if tile >= 0 else -1
    return place, block


@gluon.jit
def work_of(place, block, gates, sizes, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, CAUSAL: gl.constexpr, HAS_GATE: gl.constexpr):
    """(sample, head, first row, key blocks, masked ones among them, gate): none for a head gated to 0."""
    heads, batch_heads, row_blocks, q_len, kv_len = sizes
    gate_ptr, stride_gb = gates
    sample = place // heads
    head = place - sample * heads
    count, masked = key_blocks(block, q_len, kv_len, BLOCK_M, BLOCK_N, CAUSAL)
    gate = 1.0
    if HAS_GATE:
        gate = gl.load(gate_ptr + sample * stride_gb + head).to(gl.float32)
        count = 0 if gate == 0.0 else count
    return sample, head, block * BLOCK_M, count, masked, gate


@gluon.jit
def load(desc, ring, at, full, empty, freed, where):
    """Copies the box at `where` into slot `at` as soon as that is free; `full` tells when it has arrived."""
    mbarrier.wait(empty.index(at), freed)
    mbarrier.expect(full.index(at), desc.block_type.nbytes)
    copy_in(desc, where, full.index(at), ring.index(at))


@gluon.jit
def produce(descs, rings, bars, gates, kv_of_query_ptr, sizes, schedule, config: gl.constexpr):
    BLOCK_N: gl.constexpr = config[0]
    STAGES: gl.constexpr = config[1]
    Q_STAGES: gl.constexpr = config[2]
    CONSUMERS: gl.constexpr = config[3]
    CAUSAL: gl.constexpr = config[4]
    HAS_GATE: gl.constexpr = config[5]
    q_desc, k_desc, v_desc, o_desc = descs
    q_s, k_s, v_s = rings
    q_full, q_empty, k_full, k_empty, v_full, v_empty, turns = bars
    heads, batch_heads, row_blocks, q_len, kv_len = sizes
    q_count = 0
    kv_count = 0
    for turn in range(turns_of(schedule)):
        place, block = place_of(turn, schedule, row_blocks)
        if block >= 0:
            sample, head, first, count, masked, gate = work_of(
                place, block, gates, sizes, CONSUMERS * ROWS, BLOCK_N, CAUSAL, HAS_GATE
            )
            if count > 0:
                kv_head = gl.load(kv_of_query_ptr + head)
                for step in range(count + 1):
                    item = kv_count + step
                    start = (count - 1 - step) * BLOCK_N
                    if step < count:
                        load(
                            k_desc, k_s, slot(item, STAGES), k_full, k_empty, freed_phase(item, STAGES), [sample, kv_head, start, 0]
                        )
                    if step == 0:
                        for who in gl.static_range(CONSUMERS):
                            load(
                                q_desc, q_s, slot(q_count, Q_STAGES) * CONSUMERS + who, q_full, q_empty,
                                freed_phase(q_count, Q_STAGES), [sample, head, first + who * ROWS, 0],
                            )  # fmt: skip
                    else:
                        load(
                            v_desc, v_s, slot(item - 1, STAGES), v_full, v_empty, freed_phase(item - 1, STAGES),
                            [sample, kv_head, start + BLOCK_N, 0],
                        )  # fmt: skip
                q_count += 1
                kv_count += count


@gluon.jit
def softmax_step(
    s, m_i, l_i, e_i, d_i, scale, rows, start, offset, kv_len, CAUSAL: gl.constexpr, MASKED: gl.constexpr, FIRST: gl.constexpr,
    STATS: gl.constexpr, SIDE: gl.constexpr,
):  # fmt: skip
    """One block of the online softmax: (p, alpha, m, l, e, d).

    l is kept as 8 sums per row, each within one thread; reducing over groups of 8 columns first also gives the maximum several
    independent chains. With STATS so are e, the sum of p times its base-2 logarithm, and d, the sum of p times the distance.
    """
    ROW: gl.constexpr = m_i.type.layout
    BLOCK_N: gl.constexpr = s.shape[1]
    if MASKED:
        cols = start + gl.arange(0, BLOCK_N, gl.SliceLayout(0, s.type.layout))
        seen = (cols < kv_len)[None, :]
        if CAUSAL:
            seen = seen & (cols[None, :] <= rows[:, None] + offset)
        s = gl.where(seen, s, float("-inf"))
    highest = gl.max(gl.max(s.reshape([ROWS, BLOCK_N // 8, 8]), 1), 1)
    m_new = gl.maximum(m_i, gl.convert_layout(highest, ROW, assert_trivial=True) * scale)
    m_safe = m_new
    if MASKED:
        # A row that has seen no key yet keeps -inf; 0 stands in for it so that no -inf minus -inf arises.
        m_safe = gl.where(m_new == float("-inf"), 0.0, m_new)
    x = s * scale - m_safe[:, None]
    p = gl.exp2(x)
    alpha = gl.exp2(m_i - m_safe)
    sums = gl.sum(p.reshape([ROWS, BLOCK_N // 8, 8]), 1)
    if STATS:
        if MASKED:
            x = gl.maximum(x, -1.0e4)
        e_new, d_new = block_patterns(p, x, sums, rows, start, offset, SIDE)
    if not FIRST:
        SUM: gl.constexpr = gl.SliceLayout(1, sums.type.layout)
        old = gl.convert_layout(alpha, SUM, assert_trivial=True)[:, None]
        if STATS:
            shift = gl.where(m_i == float("-inf"), 0.0, m_i - m_safe)
            e_new += old * (e_i + l_i * gl.convert_layout(shift, SUM, assert_trivial=True)[:, None])
            d_new += old * d_i
        sums += l_i * old
    if STATS:
        e_i = e_new
        d_i = d_new
    return p, alpha, m_new, sums, e_i, d_i


@gluon.jit
def scores(q, k_s, kv_count, step, k_full, turns, WHO: gl.constexpr, STAGES: gl.constexpr):
    """Starts s = q k^T for the step-th key block of the tile, when the block is there and the turn is ours."""
    item = kv_count + step
    at = slot(item, STAGES)
    BLOCK_N: gl.constexpr = k_s.shape[3]
    DIM: gl.constexpr = k_s.shape[4]
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    zeros = gl.zeros([ROWS, BLOCK_N], gl.float32, s_layout)
    mbarrier.wait(k_full.index(at), filled_phase(item, STAGES))
    mbarrier.wait(turns.index(WHO), turn_phase(item, WHO))
    k = k_s.index(at).reshape([BLOCK_N, DIM]).permute((1, 0))
    return warpgroup_mma(q, k, zeros, use_acc=False, is_async=True)


@gluon.jit
def consume_blocks(
    begin, end, state, q, tile, rings, bars, scale, config: gl.constexpr, WHO: gl.constexpr, MASKED: gl.constexpr,
    SIDE: gl.constexpr,
):  # fmt: skip
    """Steps begin..end of a tile. On entry and exit p holds the exponentials of the step before, whose v has arrived.

    SIDE: where the keys lie that the rows see (`block_patterns`).
    """
    STAGES: gl.constexpr = config[1]
    CONSUMERS: gl.constexpr = config[3]
    CAUSAL: gl.constexpr = config[4]
    STATS: gl.constexpr = config[6]
    p, acc, m_i, l_i, e_i, d_i = state
    rows, count, kv_count, offset, kv_len = tile
    q_s, k_s, v_s = rings
    q_full, q_empty, k_full, k_empty, v_full, v_empty, turns = bars
    BLOCK_N: gl.constexpr = k_s.shape[3]
    DIM: gl.constexpr = k_s.shape[4]
    for step in range(begin, end):
        item = kv_count + step
        s = scores(q, k_s, kv_count, step, k_full, turns, WHO, STAGES)
        v = v_s.index(slot(item - 1, STAGES)).reshape([BLOCK_N, DIM])
        acc = warpgroup_mma(p, v, acc, is_async=True)
        mbarrier.arrive(turns.index((WHO + 1) % CONSUMERS), count=1)
        s = warpgroup_mma_wait(1, deps=(s,))
        mbarrier.arrive(k_empty.index(slot(item, STAGES)), count=1)
        start = (count - 1 - step) * BLOCK_N
        p32, alpha, m_i, l_i, e_i, d_i = softmax_step(
            s, m_i, l_i, e_i, d_i, scale, rows, start, offset, kv_len, CAUSAL, MASKED, False, STATS, SIDE
        )
        p_next = gl.convert_layout(p32.to(k_s.dtype), p.type.layout, assert_trivial=True)
        # The wait for this block's v also keeps ptxas from moving the wait for acc up, in front of the exponentials: it moves
        # it across arithmetic, not across a branch.
        mbarrier.wait(v_full.index(slot(item, STAGES)), filled_phase(item, STAGES))
        acc, p = warpgroup_mma_wait(0, deps=(acc, p_next))
        mbarrier.arrive(v_empty.index(slot(item - 1, STAGES)), count=1)
        acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, acc.type.layout), assert_trivial=True)[:, None]
    return p, acc, m_i, l_i, e_i, d_i


@gluon.jit
def skip_tile(sample, head, first, outputs, heads, q_len, dtype: gl.constexpr, DIM: gl.constexpr):
    """Rows of a head gated to 0, or that see no key: output 0, lse -inf."""
    o_ptr, lse_ptr, stride_ob, stride_oh, stride_om = outputs
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DIM, DIM // 8], [4, 1], [1, 0])
    rows = first + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    dims = gl.arange(0, DIM, gl.SliceLayout(0, layout))
    o_ptrs = (
        o_ptr + gl.cast(sample, gl.int64) * stride_ob + head * stride_oh + rows.to(gl.int64)[:, None] * stride_om + dims[None, :]
    )
    gl.store(o_ptrs, gl.zeros([ROWS, DIM], dtype, layout), mask=(rows < q_len)[:, None])
    lse = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, layout))
    gl.store(lse_ptr + (gl.cast(sample, gl.int64) * heads + head) * q_len + rows, lse, mask=rows < q_len)


@gluon.jit
def release_query(count, q_empty, WHO: gl.constexpr, Q_STAGES: gl.constexpr, CONSUMERS: gl.constexpr):
    """Gives the slot of the count-th query tile back, once the output that took the queries' place has been copied out."""
    tma.store_wait(0)
    mbarrier.arrive(q_empty.index(slot(count, Q_STAGES) * CONSUMERS + WHO), count=1)


@gluon.jit
def consume(
    descs, rings, bars, outputs, keys, partials, gates, sizes, schedule, scale, config: gl.constexpr, WHO: gl.constexpr
):  # fmt: skip
    BLOCK_N: gl.constexpr = config[0]
    STAGES: gl.constexpr = config[1]
    Q_STAGES: gl.constexpr = config[2]
    CONSUMERS: gl.constexpr = config[3]
    CAUSAL: gl.constexpr = config[4]
    HAS_GATE: gl.constexpr = config[5]
    STATS: gl.constexpr = config[6]
    q_desc, k_desc, v_desc, o_desc = descs
    q_s, k_s, v_s = rings
    q_full, q_empty, k_full, k_empty, v_full, v_empty, turns = bars
    kv_of_query_ptr, k_ptr, stride_kb, stride_kh = keys
    partial_ptr, parts = partials
    o_ptr, lse_ptr, stride_ob, stride_oh, stride_om = outputs
    heads, batch_heads, row_blocks, q_len, kv_len = sizes
    plane = gl.cast(batch_heads, gl.int64) * parts
    DIM: gl.constexpr = q_s.shape[4]
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    ROW: gl.constexpr = gl.SliceLayout(1, s_layout)
    offset = kv_len - q_len
    q_count = 0
    kv_count = 0
    for turn in range(turns_of(schedule)):
        place, block = place_of(turn, schedule, row_blocks)
        if block >= 0:
            sample, head, first, count, masked, gate = work_of(
                place, block, gates, sizes, CONSUMERS * ROWS, BLOCK_N, CAUSAL, HAS_GATE
            )
            first += WHO * ROWS
            partial = partial_ptr + (gl.cast(sample, gl.int64) * heads + head) * parts + first // WARP_ROWS
            if count == 0:
                skip_tile(sample, head, first, outputs, heads, q_len, k_s.dtype, DIM)
                if STATS:
                    store_no_patterns(partial, plane, ROW)
            else:
                q_at = slot(q_count, Q_STAGES) * CONSUMERS + WHO
                q = q_s.index(q_at).reshape([ROWS, DIM])
                rows = first + gl.arange(0, ROWS, ROW)
                mbarrier.wait(q_full.index(q_at), filled_phase(q_count, Q_STAGES))
                s = scores(q, k_s, kv_count, 0, k_full, turns, WHO, STAGES)
                mbarrier.arrive(turns.index((WHO + 1) % CONSUMERS), count=1)
                s = warpgroup_mma_wait(0, deps=(s,))
                mbarrier.arrive(k_empty.index(slot(kv_count, STAGES)), count=1)
                if q_count > 0:
                    release_query(q_count - 1, q_empty, WHO, Q_STAGES, CONSUMERS)
                m_i = gl.full([ROWS], float("-inf"), gl.float32, ROW)
                start = (count - 1) * BLOCK_N
                p32, alpha, m_i, l_i, e_i, d_i = softmax_step(
                    s, m_i, m_i, m_i, m_i, scale, rows, start, offset, kv_len, CAUSAL, True, True, STATS, -1 if CAUSAL else 0
                )
                p = gl.convert_layout(p32.to(k_s.dtype), p_layout, assert_trivial=True)
                acc = gl.zeros([ROWS, DIM], gl.float32, o_layout)
                mbarrier.wait(v_full.index(slot(kv_count, STAGES)), filled_phase(kv_count, STAGES))
                state = (p, acc, m_i, l_i, e_i, d_i)
                row_tile = (rows, count, kv_count, offset, kv_len)
                if CAUSAL:
                    begin = gl.maximum(masked, 1)
                    state = consume_blocks(1, masked, state, q, row_tile, rings, bars, scale, config, WHO, True, -1)
                    state = consume_blocks(begin, count, state, q, row_tile, rings, bars, scale, config, WHO, False, -1)
                elif STATS:
                    middle, rest = sides(first, count, offset, BLOCK_N)
                    state = consume_blocks(1, middle, state, q, row_tile, rings, bars, scale, config, WHO, False, 1)
                    state = consume_blocks(middle, rest, state, q, row_tile, rings, bars, scale, config, WHO, False, 0)
                    state = consume_blocks(rest, count, state, q, row_tile, rings, bars, scale, config, WHO, False, -1)
                else:
                    state = consume_blocks(1, count, state, q, row_tile, rings, bars, scale, config, WHO, False, 0)
                p, acc, m_i, l_i, e_i, d_i = state
                last = slot(kv_count + count - 1, STAGES)
                acc = warpgroup_mma(p, v_s.index(last).reshape([BLOCK_N, DIM]), acc, is_async=True)
                total = gl.convert_layout(gl.sum(l_i, 1), ROW, assert_trivial=True)
                # A row that sees no key: output 0, lse -inf.
                total = gl.where(total == 0.0, 1.0, total)
                lse_ptrs = lse_ptr + (gl.cast(sample, gl.int64) * heads + head) * q_len + rows
                gl.store(lse_ptrs, (m_i + gl.log2(total)) * LN2, mask=rows < q_len)
                acc = warpgroup_mma_wait(0, deps=(acc,))
                mbarrier.arrive(v_empty.index(last), count=1)
                # The output leaves through the buffer that held q.
                acc = acc * gl.convert_layout(gate / total, gl.SliceLayout(1, o_layout), assert_trivial=True)[:, None]
                if STATS:
                    kv_head = gl.cast(gl.load(kv_of_query_ptr + head), gl.int64)
                    s_0 = first_score(q, k_ptr + gl.cast(sample, gl.int64) * stride_kb + kv_head * stride_kh, DIM, ROW)
                    store_patterns(
                        partial, plane, (rows < q_len) & (m_i > float("-inf")), m_i, total,
                        gl.exp2(s_0 * scale - m_i) / total,
                        gl.convert_layout(gl.sum(e_i, 1), ROW, assert_trivial=True),
                        gl.convert_layout(gl.sum(d_i, 1), ROW, assert_trivial=True),
                        gl.convert_layout(gl.sqrt(gl.sum(acc * acc, 1)), ROW, assert_trivial=True),
                    )  # fmt: skip
                q.store(acc.to(k_s.dtype))
                fence_async_shared()
                copy_out(o_desc, [sample, head, first, 0], q_s.index(q_at))
                q_count += 1
                kv_count += count
    tma.store_wait(0)


@gluon.jit
def barriers(NUMBER: gl.constexpr, ARRIVALS: gl.constexpr):
    bars = gl.allocate_shared_memory(gl.int64, [NUMBER, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(NUMBER):
        mbarrier.init(bars.index(i), count=ARRIVALS)
    return bars


# No integer is specialised: one compilation serves every length and head count, also those of 1.
@gluon.jit(
    do_not_specialize=[
        "stride_gb", "stride_ob", "stride_oh", "stride_om", "stride_kb", "stride_kh", "heads", "batch_heads", "row_blocks", "q_len",
        "kv_len", "rounds", "rest", "parts",
    ]
)  # fmt: skip
def attention_forward_hopper_kernel(
    q_desc, k_desc, v_desc, o_desc, o_ptr, lse_ptr, gate_ptr, kv_of_query_ptr, k_ptr, partial_ptr, stride_gb, stride_ob, stride_oh,
    stride_om, stride_kb, stride_kh, table_ptr, rounds, rest, heads, batch_heads, row_blocks, q_len, kv_len, parts, scale,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr, Q_STAGES: gl.constexpr, CONSUMERS: gl.constexpr, CAUSAL: gl.constexpr,
    HAS_GATE: gl.constexpr, STATS: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    gl.static_assert(STAGES >= 2, "a consumer waits for one block's v before it releases the one before")
    gl.static_assert(Q_STAGES >= 2, "a consumer waits for one tile's q before it releases the one before")
    q_s = gl.allocate_shared_memory(q_desc.dtype, [CONSUMERS * Q_STAGES] + q_desc.block_type.shape, q_desc.layout)
    k_s = gl.allocate_shared_memory(k_desc.dtype, [STAGES] + k_desc.block_type.shape, k_desc.layout)
    v_s = gl.allocate_shared_memory(v_desc.dtype, [STAGES] + v_desc.block_type.shape, v_desc.layout)
    q_full, q_empty = barriers(CONSUMERS * Q_STAGES, 1), barriers(CONSUMERS * Q_STAGES, 1)
    k_full, k_empty = barriers(STAGES, 1), barriers(STAGES, CONSUMERS)
    v_full, v_empty = barriers(STAGES, 1), barriers(STAGES, CONSUMERS)
    bars = (q_full, q_empty, k_full, k_empty, v_full, v_empty, barriers(CONSUMERS, 1))
    outputs = (o_ptr, lse_ptr, stride_ob, stride_oh, stride_om)
    sizes, schedule = (heads, batch_heads, row_blocks, q_len, kv_len), (table_ptr, rounds, rest)
    descs, rings, gates = (q_desc, k_desc, v_desc, o_desc), (q_s, k_s, v_s), (gate_ptr, stride_gb)
    keys, partials = (kv_of_query_ptr, k_ptr, stride_kb, stride_kh), (partial_ptr, parts)
    config: gl.constexpr = (BLOCK_N, STAGES, Q_STAGES, CONSUMERS, CAUSAL, HAS_GATE, STATS)
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (consume, (descs, rings, bars, outputs, keys, partials, gates, sizes, schedule, scale, config, 0)),
                (consume, (descs, rings, bars, outputs, keys, partials, gates, sizes, schedule, scale, config, 1)),
                (produce, (descs, rings, bars, gates, kv_of_query_ptr, sizes, schedule, config)),
            ],
            [4, 1],
            [REGISTERS, 24],
        )
    else:
        gl.warp_specialize(
            [
                (consume, (descs, rings, bars, outputs, keys, partials, gates, sizes, schedule, scale, config, 0)),
                (consume, (descs, rings, bars, outputs, keys, partials, gates, sizes, schedule, scale, config, 1)),
                (consume, (descs, rings, bars, outputs, keys, partials, gates, sizes, schedule, scale, config, 2)),
                (produce, (descs, rings, bars, gates, kv_of_query_ptr, sizes, schedule, config)),
            ],
            [4, 4, 1],
            [REGISTERS, REGISTERS, 24],
        )
