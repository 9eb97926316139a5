"""The probabilities again, from the products of queries and keys and the saved lse."""

from __future__ import annotations

import triton
import triton.language as tl

from headprune.kernels.scores import LOG2E, biased, capped, visible_tile, with_alibi

_LOG2E = tl.constexpr(LOG2E)


@triton.jit
def saved_lse(pointers, exists):
    """lse in base 2; +inf, so that every probability is 0, where a row attended to nothing."""
    lse = tl.load(pointers, mask=exists, other=float("-inf"))
    return tl.where(lse == float("-inf"), float("inf"), lse * _LOG2E)


@triton.jit
def probabilities(
    qk, lse, rows, cols, q_len, kv_len, scale, softcap, window, slope, bias_ptrs,
    EDGE: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, PRECISE: tl.constexpr,
    ALIBI: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """(p, seen, d score / d (qk * scale)), each a tile of the products' shape; in tiles without an edge all is seen.

    `lse` (base 2), `rows` and `cols` broadcast against qk, in either orientation.
    """
    s = capped(qk, scale, softcap, SOFTCAP, PRECISE)
    steepness = s
    if SOFTCAP:
        steepness = 1.0 - (s / softcap) * (s / softcap)
    if ALIBI:
        s = with_alibi(s, rows, cols, kv_len - q_len, slope)
    seen = rows < q_len
    if EDGE:
        seen = visible_tile(rows, cols, q_len, kv_len, window, CAUSAL, WINDOW)
    if BIAS > 0:
        s, seen = biased(s, seen, bias_ptrs, BIAS)
    x = s - lse
    if BIAS == 1:
        # Far from 0 the lse has lost digits.
        x = tl.minimum(x, 0.0)
    p = tl.exp2(x)
    if EDGE:
        p = tl.where(seen, p, 0.0)
    return p, seen, steepness
