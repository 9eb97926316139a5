"""The score arithmetic that every attention kernel shares: visibility, soft cap, ALiBi, bias, and head_dim in two parts.

Scores are kept in base 2: s = log2(e) * (the score that enters the softmax), so that probabilities are exp2(s - lse). The
launchers hand over `scale` * log2(e), `softcap` * log2(e) and slopes that are multiplied here. Tiles are given by `rows` (queries)
and `cols` (keys) that broadcast against each other, [M, 1] with [1, N] or [1, M] with [N, 1], so that a kernel may work on
transposed scores. `offset` is kv_len - q_len: query i stands at position i + offset among the keys.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

LOG2E = math.log2(math.e)
LN2 = math.log(2)
_LOG2E = tl.constexpr(LOG2E)
_LOWEST = tl.constexpr(torch.finfo(torch.float32).min)
_TWICE_LOG2E = tl.constexpr(2 * LOG2E)

# How a bias is given to a kernel.
NO_BIAS, ADDED_BIAS, BOOL_BIAS = 0, 1, 2


@triton.jit
def visible_tile(rows, cols, q_len, kv_len, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """Bool tile: the key lies inside, before the query where CAUSAL, and nearer than `window` where WINDOW."""
    seen = (rows < q_len) & (cols < kv_len)
    if CAUSAL or WINDOW:
        ahead = cols - (rows + (kv_len - q_len))
        if CAUSAL:
            seen = seen & (ahead <= 0)
        if WINDOW:
            seen = seen & (ahead > -window) & (ahead < window)
    return seen


@triton.jit
def key_mask_row(mask_ptr, cols, stride, kv_len):
    """Bool, shaped as `cols`: the key mask (uint8, 0 = hidden) of one sample, False behind kv_len."""
    return tl.load(mask_ptr + cols * stride, mask=cols < kv_len, other=0) != 0


@triton.jit
def biased(s, seen, bias_ptrs, BIAS: tl.constexpr):
    """(scores, visibility) under a bias tile: added, and hiding where it is -inf (BIAS 1), or uint8, hiding where it is 0 (2)."""
    if BIAS == 1:
        bias = tl.load(bias_ptrs, mask=seen, other=float("-inf")).to(tl.float32)
        seen = bias > float("-inf")
        # torch.finfo(dtype).min, which masks are often filled with, does not become -inf.
        s = s + tl.maximum(bias * _LOG2E, _LOWEST)
    if BIAS == 2:
        seen = tl.load(bias_ptrs, mask=seen, other=0) != 0
    return s, seen


@triton.jit
def tanh(x, PRECISE: tl.constexpr):
    """tanh with an absolute error of 1e-7; PRECISE also keeps the relative error near 0 (Cephes tanhf)."""
    # Far out exp2 gives inf, and the quotient 0.
    far = 1.0 - 2.0 / (1.0 + tl.exp2(x * _TWICE_LOG2E))
    if PRECISE:
        z = x * x
        series = -5.70498872745e-3 * z + 2.06390887954e-2
        series = series * z - 5.37397155531e-2
        series = series * z + 1.33314422036e-1
        series = series * z - 3.33332819422e-1
        far = tl.where(tl.abs(x) < 0.625, x + x * (z * series), far)
    return far


@triton.jit
def capped(qk, scale, softcap, SOFTCAP: tl.constexpr, PRECISE: tl.constexpr):
    """Scores of the products qk: qk * scale, or softcap * tanh(qk * scale / softcap).

    The derivative with respect to qk is scale * (1 - (result / softcap)^2) with a cap, scale without.
    """
    if SOFTCAP:
        s = softcap * tanh(qk * (scale / softcap), PRECISE)
    else:
        s = qk * scale
    return s


@triton.jit
def with_alibi(s, rows, cols, offset, slope):
    """s minus slope * log2(e) * distance. `slope` is natural, fp32."""
    return s - (slope * _LOG2E) * tl.abs((cols - (rows + offset)).to(tl.float32))


@triton.jit
def load_part(base, rows, stride, keep, START: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr, MASKED: tl.constexpr):
    """Columns START .. START + WIDTH of the rows [R] of a matrix with last stride 1 -> [R, WIDTH].

    0 from column DIM on and, where MASKED, in rows that are not in `keep` (bool [R]), which are not read. rows * stride must stay
    below 2^31: put the rest into `base`.
    """
    dims = START + tl.arange(0, WIDTH)
    pointers = base + rows[:, None] * stride + dims[None, :]
    if START + WIDTH > DIM:
        if MASKED:
            tile = tl.load(pointers, mask=keep[:, None] & (dims[None, :] < DIM), other=0.0)
        else:
            tile = tl.load(pointers, mask=dims[None, :] < DIM, other=0.0)
    elif MASKED:
        tile = tl.load(pointers, mask=keep[:, None], other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def store_part(base, tile, rows, stride, keep, START: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr):
    """Stores what `load_part` loads, in the matrix' dtype; rows not in `keep` and columns from DIM on are left alone."""
    dims = START + tl.arange(0, WIDTH)
    pointers = base + rows[:, None] * stride + dims[None, :]
    if START + WIDTH > DIM:
        tl.store(pointers, tile.to(base.dtype.element_ty), mask=keep[:, None] & (dims[None, :] < DIM))
    else:
        tl.store(pointers, tile.to(base.dtype.element_ty), mask=keep[:, None])


@triton.jit
def dot_parts(a_0, a_1, b_0, b_1, SECOND: tl.constexpr):
    """a_0 @ b_0^T, plus a_1 @ b_1^T where there is a second part; fp32 accumulation, true fp32 for fp32 inputs."""
    product = tl.dot(a_0, tl.trans(b_0), input_precision="ieee")
    if SECOND > 0:
        product = tl.dot(a_1, tl.trans(b_1), product, input_precision="ieee")
    return product


def precise_tanh(dtype: torch.dtype, softcap: float) -> bool:
    """Whether tanh's absolute error, times the cap, would show in the scores."""
    return dtype == torch.float32 or softcap > 1000


def split_dim(dim: int) -> tuple[int, int]:
    """Widths of the one or two tiles (powers of two, 16 and more; the second may be 0) that cover `dim` columns.

    80 gives (64, 16), 96 (64, 32), 192 (128, 64), where one power of two would compute 128, 128 and 256 columns.
    """
    first = max(16, 1 << (dim.bit_length() - 1))
    rest = dim - first
    if rest <= 0:
        return first, 0
    second = max(16, triton.next_power_of_2(rest))
    return (first, second) if second < first else (2 * first, 0)
