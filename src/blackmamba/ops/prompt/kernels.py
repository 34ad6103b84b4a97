"""Triton kernels of a pass over prompts, between its products; gpu.py launches them.

Letters: b batch, l sequence, t tokens (b l), m d_model, d d_inner, n d_state, e experts.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
STREAM, SUM, TABLE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def norm_kernel(
    x, other, weight, eps, total, y, router, bias, ids, gate, t, m,
    SOURCE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
    E: tl.constexpr,
):  # fmt: skip
    """y = RMSNorm of a row: of x, of total = x + other, or of total = x[other[i]]; and with E
    experts which of them has the largest logit, the first of equals, and the sigmoid of that.

    Owns ROWS rows. Keeps them, and E sums for each of BLOCK columns. Moves rows once each way; the
    router, times the norm's weight, comes from the first cache. Bound by bytes.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    real = row < t
    source = tl.load(other + row, real, other=0) if SOURCE == TABLE else row
    squares = tl.zeros([ROWS, BLOCK], tl.float32)
    values = ()
    sums = ()
    for _ in tl.static_range(E):
        sums += (tl.zeros([ROWS, BLOCK], tl.float32),)
    for block in tl.static_range(BLOCKS):
        k = block * BLOCK + tl.arange(0, BLOCK)
        inside = real[:, None] & (k < m)[None, :]
        at = row[:, None] * m + k[None, :]
        v = tl.load(x + source[:, None] * m + k[None, :], inside, other=0.0).to(tl.float32)
        if SOURCE == SUM:
            v += tl.load(other + at, inside, other=0.0).to(tl.float32)
        if SOURCE != STREAM:
            stored = v.to(total.dtype.element_ty)
            tl.store(total + at, stored, inside)
            v = stored.to(tl.float32)  # the norm is of what is stored
        values += (v,)
        squares += v * v
        more = ()
        for j in tl.static_range(E):
            w = tl.load(router + j * m + k, k < m, other=0.0)
            more += (sums[j] + v * w[None, :],)
        sums = more
    scale = 1 / tl.sqrt(tl.sum(squares, 1) / m + eps)
    for block in tl.static_range(BLOCKS):
        k = block * BLOCK + tl.arange(0, BLOCK)
        w = tl.load(weight + k, k < m, other=0.0).to(tl.float32)
        out = values[block] * scale[:, None] * w[None, :]
        inside = real[:, None] & (k < m)[None, :]
        tl.store(y + row[:, None] * m + k[None, :], out.to(y.dtype.element_ty), inside)
    if E > 0:
        best = tl.sum(sums[0], 1) * scale + tl.load(bias)
        chosen = tl.zeros([ROWS], tl.int64)
        for j in tl.static_range(1, E):
            logit = tl.sum(sums[j], 1) * scale + tl.load(bias + j)
            chosen = tl.where(logit > best, j, chosen)
            best = tl.maximum(logit, best)
        tl.store(ids + row, chosen, real)
        tl.store(gate + row, 1 / (1 + tl.exp2(-LOG2E * best)), real)


@triton.jit
def fill_pads_kernel(dt, lengths, l, d, stride, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """dt = -infinity behind each row's length, so that a pad leaves the scan's state as it is.

    Owns ROWS tokens of a row and BLOCK channels, and is done at once where there is no pad. Bound
    by its launch.
    """
    row = tl.program_id(2)
    t = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    length = tl.load(lengths + row)
    if tl.program_id(1) * ROWS + ROWS > length:
        at = (row.to(tl.int64) * l + t)[:, None] * stride + k[None, :]
        pad = ((t >= length) & (t < l))[:, None] & (k < d)[None, :]
        tl.store(dt + at, tl.full([ROWS, BLOCK], float("-inf"), tl.float32), pad)


@triton.jit
def last_kernel(
    state, C, x, z, D, last, y, d, n, C_stride,
    BLOCK: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """y = (C h + D x) silu(z) of each row's last token alone, which state h was left by.

    Owns BLOCK channels of a row. Moves h once. Bound by its launch.
    """
    row = tl.program_id(1).to(tl.int64)
    token = tl.load(last + row)
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    j = tl.arange(0, N)
    inside = k < d
    c = tl.load(C + token * C_stride + j, j < n, other=0.0).to(tl.float32)
    at = (row * d + k)[:, None] * n + j[None, :]
    h = tl.load(state + at, inside[:, None] & (j < n)[None, :], other=0.0)
    v = tl.load(x + token * d + k, inside, other=0.0).to(tl.float32)
    out = tl.sum(h * c[None, :], 1) + tl.load(D + k, inside, other=0.0) * v
    gate = tl.load(z + row * d + k, inside, other=0.0).to(tl.float32)
    out = out * gate / (1 + tl.exp2(-LOG2E * gate))
    tl.store(y + row * d + k, out.to(y.dtype.element_ty), inside)
