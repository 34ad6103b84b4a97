"""Triton kernels of the selective scan, and of its forward pass; gpu.py launches them.

A program owns BD channels of one row of the batch with all their states, [BD, N] numbers that stay
in registers, and walks over one chunk of its tokens. Time is read in tiles of four tokens, [BD, 4]:
the four lanes that share a channel's states each prepare one token (softplus, delta x, gate), hand
it to the others by a shuffle, and finish one token (skip, gate, store), so that nothing per token
and channel is done twice.

Where rows and channels alone do not fill the GPU, time is cut into chunks that run side by side:
one pass finds what each chunk leaves behind had it begun with nothing, `carry_kernel` chains those
into what each begins with, and the main pass runs from there.

Letters: b batch, l sequence, d d_inner, n d_state (N: padded to a power of two).
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _spread(tile, i: tl.constexpr, BD: tl.constexpr):
    """Column i of a tile [BD, 4], as [BD, 1]: one shuffle."""
    return tl.gather(tile, tl.full([BD, 1], i, tl.int32), 1)


@triton.jit
def _at(rows, t0, stride, c):
    """Where a tile [BD, 4] lies: tokens t0 .. t0 + 3 of channels c."""
    return rows + tl.cast(t0, tl.int64) * stride + (tl.arange(0, 4)[None, :] * stride + c[:, None])


@triton.jit
def _softplus(v):
    """log(1 + exp(v)) to 2e-7 of itself: max(v, 0) + log1p(exp(-|v|)), the latter by a polynomial
    fitted at Chebyshev's points, on the multiply-add units."""
    e = tl.exp2(-tl.abs(v) * LOG2E)
    p = 0.005253457929939032 * e - 0.02958850748836994
    p = p * e + 0.07836166769266129
    p = p * e - 0.13674770295619965
    p = p * e + 0.19111430644989014
    p = p * e - 0.24844369292259216
    p = p * e + 0.33319270610809326
    p = p * e - 0.49999502301216125
    p = p * e + 1.0
    return tl.maximum(v, 0.0) + e * p


@triton.jit
def _delta(raw, mask, SOFTPLUS: tl.constexpr):
    """The step size; 0 outside of the mask, where a token leaves the state as it is."""
    delta = _softplus(raw) if SOFTPLUS else raw
    return tl.where(mask, delta, 0.0)


@triton.jit
def _decay(dl, A2, reset, i: tl.constexpr, HAS_SEQ: tl.constexpr):
    """exp(delta A); 0 at a document's first token, whose reset is minus infinity."""
    exponent = dl * A2
    if HAS_SEQ:
        exponent += tl.load(reset + i)
    return tl.exp2(exponent)


@triton.jit
def _rounded(h, kind: tl.constexpr):
    """To the nearest number of this type; the interpreter would cut to bfloat16."""
    if kind == tl.bfloat16:
        bits = h.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        h = bits.to(tl.float32, bitcast=True)
    return h.to(kind)


@triton.jit
def pack_kernel(
    B, C, seq, packed, resets, there, l, l_padded, n, zeros,
    B_b, B_l, B_n, C_b, C_l, C_n, s_b, s_l,
    N: tl.constexpr, T: tl.constexpr, HAS_SEQ: tl.constexpr,
):  # fmt: skip
    """B and C side by side, zeros where there is no state or no token; and where documents begin.
    In `there`, zeros.

    Owns T tokens of one row. Keeps nothing. Moves 2 n numbers a token in, 2 N out. Bound by bytes.
    """
    row = tl.program_id(1).to(tl.int64)
    t = tl.program_id(0) * T + tl.arange(0, T)
    mine = (tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)) * 128
    for first in range(mine, zeros, tl.num_programs(0) * tl.num_programs(1) * 128):
        at = first + tl.arange(0, 128)
        tl.store(there + at, at * 0, at < zeros)
    place = tl.arange(0, 2 * N)  # of a token's numbers: B's, then C's
    k = place % N
    of_B = place < N
    real = (t < l)[:, None] & (k < n)[None, :]
    at_B = B + row * B_b + t[:, None] * B_l + k[None, :] * B_n
    at_C = C + row * C_b + t[:, None] * C_l + k[None, :] * C_n
    b = tl.load(at_B, real & of_B[None, :], other=0.0)
    c = tl.load(at_C, real & ~of_B[None, :], other=0.0)
    out = packed + (row * l_padded + t[:, None]) * (2 * N) + place[None, :]
    numbers = tl.where(of_B[None, :], b.to(tl.float32), c.to(tl.float32))
    tl.store(out, numbers.to(packed.dtype.element_ty), (t < l_padded)[:, None] & (place >= 0))
    if HAS_SEQ:
        inside = (t > 0) & (t < l)
        here = tl.load(seq + row * s_b + t * s_l, inside, other=0)
        before = tl.load(seq + row * s_b + (t - 1) * s_l, inside, other=0)
        tl.store(
            resets + row * l_padded + t, tl.where(here != before, float("-inf"), 0.0), t < l_padded
        )


@triton.jit
def carry_kernel(
    ends, decays, first, carried, n_chunks, size,
    BACK: tl.constexpr, HAS_FIRST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """carried[c] = what chunk c begins with: carried[c + 1] = decays[c] carried[c] + ends[c].

    Owns BLOCK numbers of one row's (d, N), over all chunks, from the last one if BACK. Bound by
    bytes.
    """
    row = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < size
    h = tl.zeros([BLOCK], tl.float32)
    if HAS_FIRST:
        h = tl.load(first + row * size + i, mask, other=0.0).to(tl.float32)
    for step in range(n_chunks):
        c = n_chunks - 1 - step if BACK else step
        place = (row * n_chunks + c) * size + i
        tl.store(carried + place, h, mask)
        h = tl.load(decays + place, mask, other=0.0) * h + tl.load(ends + place, mask, other=0.0)


@triton.jit
def forward_kernel(
    x, dt, A, BC, D, z, dt_bias, resets, first, y, starts, ends, decays,
    l, d, n, l_padded, n_chunks, chunk, x_b, x_l, dt_b, dt_l, z_b, z_l,
    BD: tl.constexpr, N: tl.constexpr, S: tl.constexpr,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr,
    HAS_SEQ: tl.constexpr, HAS_FIRST: tl.constexpr, KEEP: tl.constexpr, LOCAL: tl.constexpr,
    EVEN: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """y and the last state; if KEEP, the state before every S tokens. LOCAL: only what the chunk
    leaves.

    Owns BD channels of a row over one chunk. Keeps their states, [BD, N], and A in registers. Moves
    x, dt, z and y once, B and C once for every BD channels (from L2). Bound by exponentials: N + 2
    for each number of y.
    """
    pid = tl.program_id(0)
    n_blocks = tl.cdiv(d, BD)
    c = (pid % n_blocks) * BD + tl.arange(0, BD)
    piece = (pid // n_blocks) % n_chunks
    row = (pid // n_blocks // n_chunks).to(tl.int64)
    k = tl.arange(0, N)
    col = tl.arange(0, 4)
    here = c < d
    whole = here[:, None] & (k < n)[None, :]
    A2 = tl.load(A + c[:, None] * n + k[None, :], whole, other=0.0) * LOG2E
    bias = tl.load(dt_bias + c, here, other=0.0).to(tl.float32)[:, None] if HAS_BIAS else 0.0
    skip = tl.load(D + c, here, other=0.0).to(tl.float32)[:, None] if HAS_D else 0.0
    state = ((row * n_chunks + piece) * d + c[:, None]) * N + k[None, :]
    if HAS_FIRST:
        h = tl.load(first + state, here[:, None], other=0.0)
    else:
        h = tl.zeros([BD, N], tl.float32)

    begin = piece * chunk
    end = tl.minimum(l, begin + chunk)
    x += row * x_b
    dt += row * dt_b
    z += row * z_b
    y += row * l * d
    BC += row * l_padded * (2 * N)
    resets += row * l_padded
    starts += row * (l_padded // S) * d * N
    total = tl.zeros([BD, 4], tl.float32)
    any_reset = 0.0

    mask = here[:, None] & ((begin + col) < end)[None, :]
    if EVEN:
        mask = tl.full([BD, 4], True, tl.int1)
    dt_t = tl.load(_at(dt, begin, dt_l, c), mask, other=0.0)
    x_t = tl.load(_at(x, begin, x_l, c), mask, other=0.0)
    if HAS_Z and not LOCAL:
        z_t = tl.load(_at(z, begin, z_l, c), mask, other=0.0)
    for t0 in range(begin, end, 4):
        if KEEP and not LOCAL:  # noqa: SIM102 # what is not compiled first
            if t0 % S == 0:
                kept = starts + tl.cast(t0 // S, tl.int64) * d * N + c[:, None] * N + k[None, :]
                if EVEN:
                    tl.store(kept, _rounded(h, starts.dtype.element_ty))
                else:
                    tl.store(kept, _rounded(h, starts.dtype.element_ty), here[:, None])
        if not AHEAD:
            t = (t0 + col)[None, :]
            if EVEN:
                mask = tl.full([BD, 4], True, tl.int1)
                dt_t = tl.load(_at(dt, t0, dt_l, c))
                x_t = tl.load(_at(x, t0, x_l, c))
                if HAS_Z and not LOCAL:
                    z_t = tl.load(_at(z, t0, z_l, c))
            else:
                mask = here[:, None] & (t < end)
                dt_t = tl.load(_at(dt, t0, dt_l, c), mask, other=0.0)
                x_t = tl.load(_at(x, t0, x_l, c), mask, other=0.0)
                if HAS_Z and not LOCAL:
                    z_t = tl.load(_at(z, t0, z_l, c), mask, other=0.0)
        xv = x_t.to(tl.float32)
        delta = _delta(dt_t.to(tl.float32) + bias, mask, SOFTPLUS)
        drive = delta * xv
        if LOCAL:
            total += delta
        yv = tl.zeros([BD, 4], tl.float32)
        if HAS_Z and not LOCAL:
            zv = z_t.to(tl.float32)
            gate = zv / (1 + tl.exp2(zv * -LOG2E))
        mask_now = mask
        if AHEAD:  # the next tile, while this one is worked on
            t = (t0 + 4 + col)[None, :]
            if EVEN:
                mask_next = tl.broadcast_to(t0 + 4 < end, [BD, 4])
            else:
                mask_next = here[:, None] & (t < end)
                mask = mask_next
            dt_t = tl.load(_at(dt, t0 + 4, dt_l, c), mask_next, other=0.0)
            x_t = tl.load(_at(x, t0 + 4, x_l, c), mask_next, other=0.0)
            if HAS_Z and not LOCAL:
                z_t = tl.load(_at(z, t0 + 4, z_l, c), mask_next, other=0.0)
        tile = BC + tl.cast(t0, tl.int64) * (2 * N)
        for i in tl.static_range(4):
            dl = _spread(delta, i, BD)
            Bt = tl.load(tile + i * 2 * N + k)[None, :]
            a = _decay(dl, A2, resets + t0, i, HAS_SEQ)
            h = a * h + _spread(drive, i, BD) * Bt
            if LOCAL:
                if HAS_SEQ:
                    any_reset += tl.load(resets + t0 + i)
            else:
                Ct = tl.load(tile + i * 2 * N + N + k)[None, :]
                yv = tl.where((col == i)[None, :], tl.sum(h * Ct, 1, keep_dims=True), yv)
        if not LOCAL:
            if HAS_D:
                yv += skip * xv
            if HAS_Z:
                yv *= gate
            out = _at(y, t0, d, c)
            if EVEN:
                tl.store(out, yv)
            else:
                tl.store(out, yv, mask_now)
    if LOCAL:
        tl.store(ends + state, h, here[:, None])
        left = tl.exp2(tl.sum(total, 1, keep_dims=True) * A2 + any_reset)
        tl.store(decays + state, left, here[:, None])
    else:
        last = (row * d + c[:, None]) * N + k[None, :]
        tl.store(ends + last, h, here[:, None] & (piece == n_chunks - 1))
