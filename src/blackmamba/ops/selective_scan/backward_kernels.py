"""Triton kernels of the selective scan's backward pass; kernels.py explains how they work.

Letters: b batch, l sequence, d d_inner, n d_state (N: padded to a power of two).
"""

import triton
import triton.language as tl

from blackmamba.ops.selective_scan.kernels import LOG2E, _at, _decay, _delta, _spread

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def backward_local_kernel(
    dt, A, BC, z, dt_bias, resets, grad_y, ends, decays,
    l, d, n, l_padded, n_chunks, chunk, dt_b, dt_l, z_b, z_l, gy_b, gy_l,
    BD: tl.constexpr, N: tl.constexpr,
    HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, HAS_SEQ: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """The gradient of the state before each chunk, had nothing come from behind, and the chunk's
    decay.

    Owns BD channels of a row over one chunk, read backwards. Keeps the gradient, [BD, N], in
    registers. Moves dt, z and the gradient of y once. Bound by exponentials: N + 2 for each number
    of y.
    """
    pid = tl.program_id(0)
    n_blocks = tl.cdiv(d, BD)
    c = (pid % n_blocks) * BD + tl.arange(0, BD)
    piece = (pid // n_blocks) % n_chunks
    row = (pid // n_blocks // n_chunks).to(tl.int64)
    k = tl.arange(0, N)
    col = tl.arange(0, 4)
    here = c < d
    A2 = (
        tl.load(A + c[:, None] * n + k[None, :], here[:, None] & (k < n)[None, :], other=0.0)
        * LOG2E
    )
    bias = tl.load(dt_bias + c, here, other=0.0).to(tl.float32)[:, None] if HAS_BIAS else 0.0
    begin = piece * chunk
    end = tl.minimum(l, begin + chunk)
    dt += row * dt_b
    z += row * z_b
    grad_y += row * gy_b
    BC += row * l_padded * (2 * N)
    resets += row * l_padded
    g = tl.zeros([BD, N], tl.float32)
    total = tl.zeros([BD, 4], tl.float32)
    any_reset = 0.0
    n_tiles = tl.cdiv(end - begin, 4)
    for back in range(n_tiles):
        t0 = begin + (n_tiles - 1 - back) * 4
        t = (t0 + col)[None, :]
        mask = here[:, None] & (t < end)
        if EVEN:
            mask = tl.full([BD, 4], True, tl.int1)
        dt_t = tl.load(_at(dt, t0, dt_l, c), mask, other=0.0)
        gy = tl.load(_at(grad_y, t0, gy_l, c), mask, other=0.0).to(tl.float32)
        if HAS_Z:
            zv = tl.load(_at(z, t0, z_l, c), mask, other=0.0).to(tl.float32)
            gy *= zv / (1 + tl.exp2(zv * -LOG2E))
        delta = _delta(dt_t.to(tl.float32) + bias, mask, SOFTPLUS)
        total += delta
        tile = BC + tl.cast(t0, tl.int64) * (2 * N)
        for i in tl.static_range(3, -1, -1):
            Ct = tl.load(tile + i * 2 * N + N + k)[None, :]
            a = _decay(_spread(delta, i, BD), A2, resets + t0, i, HAS_SEQ)
            g = a * (g + Ct * _spread(gy, i, BD))
            if HAS_SEQ:
                any_reset += tl.load(resets + t0 + i)
    state = ((row * n_chunks + piece) * d + c[:, None]) * N + k[None, :]
    tl.store(ends + state, g, here[:, None])
    left = tl.exp2(tl.sum(total, 1, keep_dims=True) * A2 + any_reset)
    tl.store(decays + state, left, here[:, None])


@triton.jit
def backward_kernel(
    x, dt, A, BC, D, z, dt_bias, resets, starts, grad_y, after,
    grad_x, grad_dt, grad_z, partial, grad_first, grad_A, grad_D, grad_bias,
    l, d, n, l_padded, n_chunks, chunk,
    x_b, x_l, dt_b, dt_l, z_b, z_l, gy_b, gy_l, gx_b, gx_l, gdt_b, gdt_l, gz_b, gz_l,
    BD: tl.constexpr, N: tl.constexpr, S: tl.constexpr, TILES: tl.constexpr,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr,
    HAS_SEQ: tl.constexpr, EVEN: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """Every gradient; those of B and C as a sum for each block of channels, in `partial`.

    Owns BD channels of a row over one chunk, read backwards. Keeps the states of TILES tiles,
    computed again from the kept ones, and the gradients of state and A in registers. Moves x, dt,
    z, the gradients of y, x, dt and z once, the states before every S tokens once, and 2 N / BD
    numbers of `partial` for each of x. Bound by instructions.
    """
    pid = tl.program_id(0)
    n_blocks = tl.cdiv(d, BD)
    block = pid % n_blocks
    c = block * BD + tl.arange(0, BD)
    piece = (pid // n_blocks) % n_chunks
    row = (pid // n_blocks // n_chunks).to(tl.int64)
    k = tl.arange(0, N)
    col = tl.arange(0, 4)
    here = c < d
    A2 = (
        tl.load(A + c[:, None] * n + k[None, :], here[:, None] & (k < n)[None, :], other=0.0)
        * LOG2E
    )
    bias = tl.load(dt_bias + c, here, other=0.0).to(tl.float32)[:, None] if HAS_BIAS else 0.0
    skip = tl.load(D + c, here, other=0.0).to(tl.float32)[:, None] if HAS_D else 0.0
    state = ((row * n_chunks + piece) * d + c[:, None]) * N + k[None, :]
    g = tl.load(after + state, here[:, None], other=0.0)
    sum_A = tl.zeros([BD, N], tl.float32)
    sum_D = tl.zeros([BD, 4], tl.float32)
    sum_bias = tl.zeros([BD, 4], tl.float32)

    begin = piece * chunk
    end = tl.minimum(l, begin + chunk)
    x += row * x_b
    dt += row * dt_b
    z += row * z_b
    grad_y += row * gy_b
    grad_x += row * gx_b
    grad_dt += row * gdt_b
    grad_z += row * gz_b
    BC += row * l_padded * (2 * N)
    resets += row * l_padded
    starts += row * (l_padded // S) * d * N
    partial += (row * (l_padded // 4) * n_blocks + block) * (8 * N)
    n_spans = tl.cdiv(end - begin, S)
    for back in range(n_spans):
        span = begin + (n_spans - 1 - back) * S
        kept = starts + tl.cast(span // S, tl.int64) * d * N + c[:, None] * N + k[None, :]
        if EVEN:
            h = tl.load(kept).to(tl.float32)
        else:
            h = tl.load(kept, here[:, None], other=0.0).to(tl.float32)
        firsts = (h,)  # before each group of TILES tiles
        for j in tl.static_range(S // 4 - TILES):
            t = (span + 4 * j + col)[None, :]
            mask = here[:, None] & (t < end)
            if EVEN:
                mask = tl.full([BD, 4], True, tl.int1)
            raw = tl.load(_at(dt, span + 4 * j, dt_l, c), mask, other=0.0).to(tl.float32) + bias
            delta = _delta(raw, mask, SOFTPLUS)
            drive = delta * tl.load(_at(x, span + 4 * j, x_l, c), mask, other=0.0).to(tl.float32)
            tile = BC + tl.cast(span + 4 * j, tl.int64) * (2 * N)
            for i in tl.static_range(4):
                Bt = tl.load(tile + i * 2 * N + k)[None, :]
                a = _decay(_spread(delta, i, BD), A2, resets + span + 4 * j, i, HAS_SEQ)
                h = a * h + _spread(drive, i, BD) * Bt
            if (j + 1) % TILES == 0:
                firsts += (h,)
        for group in tl.static_range(S // 4 // TILES - 1, -1, -1):
            h = firsts[group]
            states = (h,)
            decays = (h,)
            for tile_of_group in tl.static_range(TILES):
                t0 = span + (group * TILES + tile_of_group) * 4
                t = (t0 + col)[None, :]
                mask = here[:, None] & (t < end)
                if EVEN:
                    mask = tl.full([BD, 4], True, tl.int1)
                raw = tl.load(_at(dt, t0, dt_l, c), mask, other=0.0).to(tl.float32) + bias
                delta = _delta(raw, mask, SOFTPLUS)
                drive = delta * tl.load(_at(x, t0, x_l, c), mask, other=0.0).to(tl.float32)
                tile = BC + tl.cast(t0, tl.int64) * (2 * N)
                for i in tl.static_range(4):
                    Bt = tl.load(tile + i * 2 * N + k)[None, :]
                    a = _decay(_spread(delta, i, BD), A2, resets + t0, i, HAS_SEQ)
                    h = a * h + _spread(drive, i, BD) * Bt
                    decays += (a,)
                    states += (h,)
            for tile_of_group in tl.static_range(TILES - 1, -1, -1):
                t0 = span + (group * TILES + tile_of_group) * 4
                t = (t0 + col)[None, :]
                mask = here[:, None] & (t < end)
                if EVEN:
                    mask = tl.full([BD, 4], True, tl.int1)
                raw = tl.load(_at(dt, t0, dt_l, c), mask, other=0.0).to(tl.float32) + bias
                delta = _delta(raw, mask, SOFTPLUS)
                xv = tl.load(_at(x, t0, x_l, c), mask, other=0.0).to(tl.float32)
                drive = delta * xv
                gy = tl.load(_at(grad_y, t0, gy_l, c), mask, other=0.0).to(tl.float32)
                go = gy  # the gradient before the gate
                if HAS_Z:
                    zv = tl.load(_at(z, t0, z_l, c), mask, other=0.0).to(tl.float32)
                    sigmoid = 1 / (1 + tl.exp2(zv * -LOG2E))
                    gate = zv * sigmoid
                    go = gy * gate
                yv = tl.zeros([BD, 4], tl.float32)
                g_drive = tl.zeros([BD, 4], tl.float32)
                g_decay = tl.zeros([BD, 4], tl.float32)
                tile = BC + tl.cast(t0, tl.int64) * (2 * N)
                at_B = partial + tl.cast(t0 // 4, tl.int64) * n_blocks * (8 * N)
                at_C = at_B + 4 * N
                for_B = (g,)  # the fourth token's first
                for_C = (g,)
                for i in tl.static_range(3, -1, -1):
                    dl = _spread(delta, i, BD)
                    gi = _spread(go, i, BD)
                    Bt = tl.load(tile + i * 2 * N + k)[None, :]
                    Ct = tl.load(tile + i * 2 * N + N + k)[None, :]
                    h = states[tile_of_group * 4 + i + 1]
                    now = (col == i)[None, :]
                    g += Ct * gi
                    if HAS_Z:
                        yv = tl.where(now, tl.sum(h * Ct, 1, keep_dims=True), yv)
                    g_drive = tl.where(now, tl.sum(g * Bt, 1, keep_dims=True), g_drive)
                    of_B = g * _spread(drive, i, BD)
                    of_C = h * gi
                    if SUM == "add":
                        tl.store(at_B + k * 4 + i, tl.sum(of_B, 0))
                        tl.store(at_C + k * 4 + i, tl.sum(of_C, 0))
                    else:
                        for_B += (of_B,)
                        for_C += (of_C,)
                    g *= decays[tile_of_group * 4 + i + 1]
                    w = g * states[tile_of_group * 4 + i]  # the gradient of delta A
                    sum_A += w * dl
                    g_decay = tl.where(now, tl.sum(w * A2, 1, keep_dims=True), g_decay)
                if (
                    SUM != "add"
                ):  # sums over channels by the matrix units: rows of ones times [BD, 4 N]
                    all_B = tl.join(tl.join(for_B[4], for_B[2]), tl.join(for_B[3], for_B[1]))
                    all_C = tl.join(tl.join(for_C[4], for_C[2]), tl.join(for_C[3], for_C[1]))
                    all_B = tl.reshape(all_B, [BD, 4 * N])
                    all_C = tl.reshape(all_C, [BD, 4 * N])
                    if SUM == "bf16":
                        ones = tl.full([16, BD], 1.0, tl.bfloat16)
                        all_B = tl.dot(ones, all_B.to(tl.bfloat16))
                        all_C = tl.dot(ones, all_C.to(tl.bfloat16))
                    else:
                        ones = tl.full([16, BD], 1.0, tl.float32)
                        all_B = tl.dot(ones, all_B, input_precision=SUM)
                        all_C = tl.dot(ones, all_C, input_precision=SUM)
                    place = tl.arange(0, 16)[:, None] * 0 + tl.arange(0, 4 * N)[None, :]
                    once = tl.arange(0, 16)[:, None] + tl.arange(0, 4 * N)[None, :] * 0 == 0
                    tl.store(at_B + place, all_B, once)
                    tl.store(at_C + place, all_C, once)
                g_x = g_drive * delta
                if HAS_D:
                    yv += skip * xv
                    g_x += skip * go
                    sum_D += go * xv
                tl.store(_at(grad_x, t0, gx_l, c), g_x, mask)
                if HAS_Z:
                    g_z = gy * yv * (sigmoid + gate * (1 - sigmoid))
                    tl.store(_at(grad_z, t0, gz_l, c), g_z, mask)
                g_raw = g_decay * LN2 + g_drive * xv
                if SOFTPLUS:
                    g_raw *= 1 / (1 + tl.exp2(raw * -LOG2E))
                if HAS_BIAS:
                    sum_bias += tl.where(mask, g_raw, 0.0)
                tl.store(_at(grad_dt, t0, gdt_l, c), g_raw, mask)
    part = row * n_chunks + piece
    tl.store(grad_A + (part * d + c[:, None]) * N + k[None, :], sum_A, here[:, None])
    if HAS_D:
        tl.store(grad_D + part * d + c, tl.sum(sum_D, 1), here)
    if HAS_BIAS:
        tl.store(grad_bias + part * d + c, tl.sum(sum_bias, 1), here)
    tl.store(grad_first + (row * d + c[:, None]) * N + k[None, :], g, here[:, None] & (piece == 0))


@triton.jit
def sum_kernel(
    partial, parts_A, parts_D, parts_bias, grad_B, grad_C, grad_A, grad_D, grad_bias,
    l, d, n, n_tiles, n_blocks, n_parts, B_b, B_l, C_b, C_l,
    N: tl.constexpr, HAS_D: tl.constexpr, HAS_BIAS: tl.constexpr, OF_UNITS: tl.constexpr,
    BLOCKS: tl.constexpr, PARTS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """The gradients of B and C, sums over blocks of channels, and those of A, D and dt_bias, sums
    over parts of rows; always in the same order. One launch, for the latter take less time than it.

    Owns four tokens of one row, or CHANNELS channels. Moves n_blocks 8 N numbers in for the ones,
    n_parts (N + 2) for each channel of the others. Bound by bytes.
    """
    others = tl.num_programs(0) - n_tiles
    index, row = tl.program_id(0), tl.program_id(1)
    if index < others:
        _sum_over_parts(
            parts_A, parts_D, parts_bias, grad_A, grad_D, grad_bias,
            (index * tl.num_programs(1) + row) * CHANNELS, d, n, n_parts,
            N, HAS_D, HAS_BIAS, PARTS, CHANNELS,
        )  # fmt: skip
    else:
        _sum_over_blocks(
            partial, grad_B, grad_C, index - others, row.to(tl.int64),
            l, n, n_tiles, n_blocks, B_b, B_l, C_b, C_l, N, OF_UNITS, BLOCKS,
        )  # fmt: skip


@triton.jit
def _sum_over_blocks(
    partial, grad_B, grad_C, tile, row, l, n, n_tiles, n_blocks, B_b, B_l, C_b, C_l,
    N: tl.constexpr, OF_UNITS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """OF_UNITS: of 16 states, in the order in which `Turned` of scan_units.cu has them, in places
    of scan_backward.cu, 16 tokens of a block together."""
    together: tl.constexpr = 4 if OF_UNITS else 1
    place = tl.arange(0, 8 * N)
    blocks = tl.arange(0, ROWS)
    partial += (row * n_tiles + tile) // together * n_blocks * (together * 8 * N)
    partial += tile % together * (8 * N)
    total = tl.zeros([ROWS, 8 * N], tl.float32)
    for first in range(0, n_blocks, ROWS):
        at = (first + blocks)[:, None]
        numbers = partial + at * (together * 8 * N) + place[None, :]
        total += tl.load(numbers, at < n_blocks, other=0.0)
    total = tl.sum(total, 0)
    if OF_UNITS:
        place ^= (place & 64) >> 2
        k = place // 32 * 4 + place // 16 % 2 + place // 2 % 2 * 2
        t = tile * 4 + place // 4 % 2 * 2 + place % 2
        of_B = place // 8 % 2 == 0
    else:
        k = (place // 4) % N
        t = tile * 4 + place % 4
        of_B = place < 4 * N
    real = (k < n) & (t < l)
    tl.store(grad_B + row * B_b + t * B_l + k, total, real & of_B)
    tl.store(grad_C + row * C_b + t * C_l + k, total, real & ~of_B)


@triton.jit
def _sum_over_parts(
    parts_A, parts_D, parts_bias, grad_A, grad_D, grad_bias, first, d, n, n_parts,
    N: tl.constexpr, HAS_D: tl.constexpr, HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """A's gradient is (d, n), those of D and dt_bias (d)."""
    place = tl.arange(0, CHANNELS * N)
    c = first + place // N
    wide = first + tl.arange(0, CHANNELS)
    sum_A = tl.zeros([ROWS, CHANNELS * N], tl.float32)
    sum_D = tl.zeros([ROWS, CHANNELS], tl.float32)
    sum_bias = tl.zeros([ROWS, CHANNELS], tl.float32)
    for first_part in range(0, n_parts, ROWS):
        part = (first_part + tl.arange(0, ROWS))[:, None]
        inside = (part < n_parts) & (c < d)[None, :]
        sum_A += tl.load(parts_A + (part * d + first) * N + place[None, :], inside, other=0.0)
        inside = (part < n_parts) & (wide < d)[None, :]
        if HAS_D:
            sum_D += tl.load(parts_D + part * d + wide[None, :], inside, other=0.0)
        if HAS_BIAS:
            sum_bias += tl.load(parts_bias + part * d + wide[None, :], inside, other=0.0)
    sum_A = tl.sum(sum_A, 0)
    sum_D = tl.sum(sum_D, 0)
    sum_bias = tl.sum(sum_bias, 0)
    tl.store(grad_A + c * n + place % N, sum_A, (c < d) & (place % N < n))
    if HAS_D:
        tl.store(grad_D + wide, sum_D, wide < d)
    if HAS_BIAS:
        tl.store(grad_bias + wide, sum_bias, wide < d)
