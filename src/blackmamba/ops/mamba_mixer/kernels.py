"""Triton kernel of all that lies between in_proj and the scan, without a gradient.

Letters: b batch, l sequence, d d_inner, n d_state, r dt_rank, k d_conv.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from blackmamba.ops.gpu import interpreted

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _inputs(
    x, before, t, l, x_l, d, c, BACK: tl.constexpr, K: tl.constexpr, HAS_BEFORE: tl.constexpr
):
    """What came BACK tokens before tokens t, of channels c."""
    at = t - BACK
    place = x + at[:, None] * x_l + c[None, :]
    real = (at < l) & (t >= 0)
    if HAS_BEFORE and BACK > 0:
        place = tl.where((at < 0)[:, None], before + (K - 1 + at)[:, None] * d + c[None, :], place)
    else:
        real &= at >= 0
    return tl.load(place, real[:, None] & (c < d)[None, :], other=0.0)


@triton.jit
def _columns(weight, rows, real, d, c):
    """Of rows of a weight (.., d), those that are real, the columns c: (BD, rows)."""
    return tl.load(
        weight + rows[None, :] * d + c[:, None], real[None, :] & (c < d)[:, None], other=0.0
    )


@triton.jit
def project_kernel(
    x, conv_weight, conv_bias, before, lengths, x_proj, dt_proj, y, dt, BC, last,
    l, d, n, r, s8, x_b, x_l,
    T: tl.constexpr, BD: tl.constexpr, K: tl.constexpr, N: tl.constexpr,
    R: tl.constexpr, REST: tl.constexpr, HAS_BEFORE: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    OPERAND: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """y = silu(convolution of x), then of y's product with x_proj B and C, and dt by dt_proj. The
    convolution's weight (k, d) and bias are float32; before is (b, k - 1, d); dt_proj is (d, 8 s8),
    zeros behind r columns.

    Owns T tokens of a row, and walks over their channels twice. Keeps r + 2 N sums a token, in two
    parts of R and REST, and the next inputs. Moves x, y and dt once; both weights come from the L2
    cache, once for each program. Bound by bytes.
    """
    width = s8 * 8  # of dt_proj's rows: known to be of whole 16 bytes
    row = tl.program_id(1).to(tl.int64)
    t = tl.program_id(0) * T + tl.arange(0, T)
    x += row * x_b
    before += row * (K - 1) * d
    length = tl.load(lengths + row).to(tl.int32) if HAS_LENGTHS else l
    here = (t < l)[:, None]
    y += row * l * d
    dt += row * l * d
    BC += row * l * (2 * N)
    last += row * d * (K - 1)
    out = t[:, None] * d
    channel = tl.arange(0, BD)
    if tl.program_id(0) == 0:
        for c0 in range(0, d, BD):
            c = c0 + channel
            for j in tl.static_range(K - 1):
                at = length - (K - 1) + j
                value = tl.load(x + at * x_l + c, (c < d) & (at >= 0), other=0.0)
                if HAS_BEFORE:
                    value += tl.load(before + (K - 1 + at) * d + c, (c < d) & (at < 0), other=0.0)
                tl.store(last + c * (K - 1) + j, value, c < d)

    main, rest, state = tl.arange(0, R), R + tl.arange(0, REST), tl.arange(0, 2 * N)
    is_state = state % N < n
    state_row = r + tl.where(state < N, state, n + state - N)
    of_main = tl.zeros([T, R], tl.float32)
    of_rest = tl.zeros([T, REST], tl.float32)
    of_state = tl.zeros([T, 2 * N], tl.float32)
    newest = _inputs(x, before, t, l, x_l, d, channel, 0, K, HAS_BEFORE)
    for c0 in tl.range(0, d, BD, num_stages=1):  # no copies: they go past the first cache
        c = c0 + channel
        # the next on their way; those of earlier tokens are in the first cache then
        ahead = _inputs(x, before, t, l, x_l, d, c + BD, 0, K, HAS_BEFORE)
        taps = conv_weight + c
        w = tl.load(taps + (K - 1) * d, c < d, other=0.0)
        total = tl.load(conv_bias + c, c < d, other=0.0)[None, :] + w[None, :] * newest
        for j in tl.static_range(1, K):
            w = tl.load(taps + (K - 1 - j) * d, c < d, other=0.0)
            total += w[None, :] * _inputs(x, before, t, l, x_l, d, c, j, K, HAS_BEFORE)
        u = (total / (1 + tl.exp2(total * -LOG2E))).to(y.dtype.element_ty)
        tl.store(y + out + c[None, :], u, here & (c < d)[None, :])
        u = u.to(OPERAND)
        w_main = _columns(x_proj, main, main < r, d, c).to(OPERAND)
        w_rest = _columns(x_proj, rest, rest < r, d, c).to(OPERAND)
        w_state = _columns(x_proj, state_row, is_state, d, c).to(OPERAND)
        of_main = tl.dot(u, w_main, of_main, input_precision="ieee")
        of_rest = tl.dot(u, w_rest, of_rest, input_precision="ieee")
        of_state = tl.dot(u, w_state, of_state, input_precision="ieee")
        newest = ahead

    rounded = of_state.to(y.dtype.element_ty).to(tl.float32)
    tl.store(BC + t[:, None] * (2 * N) + state[None, :], rounded, here)
    low = of_main.to(y.dtype.element_ty).to(OPERAND)
    low_rest = of_rest.to(y.dtype.element_ty).to(OPERAND)
    for c0 in tl.range(0, d, BD, num_stages=STAGES):
        c = c0 + channel
        inside = (c < d)[None, :]
        at = dt_proj + c[None, :] * width
        w_main = tl.load(at + main[:, None], (main < width)[:, None] & inside, other=0.0).to(
            OPERAND
        )
        w_rest = tl.load(at + rest[:, None], (rest < width)[:, None] & inside, other=0.0).to(
            OPERAND
        )
        value = tl.dot(low, w_main, input_precision="ieee")
        value = tl.dot(low_rest, w_rest, value, input_precision="ieee")
        if HAS_LENGTHS:  # a pad leaves the scan's state as it is
            value = tl.where((t < length)[:, None], value, float("-inf"))
        tl.store(dt + out + c[None, :], value.to(dt.dtype.element_ty), here & inside)


def operand(dtype: torch.dtype) -> Any:
    """What products of numbers of this dtype are of."""
    if interpreted() or dtype == torch.float32:  # numpy has no bfloat16
        return tl.float32
    return tl.bfloat16 if dtype == torch.bfloat16 else tl.float16
