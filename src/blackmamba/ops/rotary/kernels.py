"""Triton kernel of `rotary`.

Letters: heads rows of all tokens' heads, n heads of a token, half pairs of a head.
"""

import triton
import triton.language as tl


@triton.jit
def rotary_kernel(
    x, cos, sin, y, heads, n, tokens, half,
    BACK: tl.constexpr, ROWS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """y: the pairs of x turned by their angles, or turned back; the tables are of `tokens` tokens,
    and begin anew after them.

    Owns ROWS heads. On chip: their numbers, in float32. Moves them once each way; the tables come
    out of the L2 cache. Bound by bytes.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, HALF)
    inside = (row < heads)[:, None] & (k < half)[None, :]
    at = row[:, None] * (2 * half) + k[None, :]
    angle = (row // n % tokens)[:, None] * half + k[None, :]
    c = tl.load(cos + angle, inside, other=0.0)
    s = tl.load(sin + angle, inside, other=0.0)
    if BACK:
        s = -s
    first = tl.load(x + at, inside, other=0.0).to(tl.float32)
    second = tl.load(x + at + half, inside, other=0.0).to(tl.float32)
    kind = y.dtype.element_ty
    tl.store(y + at, (first * c - second * s).to(kind), inside)
    tl.store(y + at + half, (second * c + first * s).to(kind), inside)
