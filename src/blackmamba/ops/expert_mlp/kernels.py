"""Triton kernels of the routed experts: between torch's grouped products, and for few tokens.

Letters: t tokens, m d_model, f d_expert, e experts.
"""

import triton
import triton.language as tl

from blackmamba.ops.activate.kernels import activated, value_and_slope


@triton.jit
def count_kernel(ids, counts, t, E: tl.constexpr, BLOCK: tl.constexpr):
    """counts[i, j]: how many of block i's tokens go to expert j.

    Owns BLOCK tokens. Moves their ids once. Bound by its launch.
    """
    i = tl.program_id(0)
    k = i * BLOCK + tl.arange(0, BLOCK)
    expert = tl.load(ids + k, k < t, other=E)
    j = tl.arange(0, E)
    tl.store(counts + i * E + j, tl.sum((expert[:, None] == j[None, :]).to(tl.int32), 0))


@triton.jit
def place_kernel(
    ids, counts, order, ends, t, n_blocks,
    E: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """order: the tokens sorted by expert, those of one in their order; ends: of each group.

    Owns BLOCK tokens. Each program sums all counts for itself: n_blocks * e numbers out of the L2
    cache; the only one of few tokens counts them itself (BLOCKS 0). Bound by its launch.
    """
    i = tl.program_id(0)
    k = i * BLOCK + tl.arange(0, BLOCK)
    j = tl.arange(0, E)
    expert = tl.load(ids + k, k < t, other=E)
    mine = (expert[:, None] == j[None, :]).to(tl.int32)
    earlier = tl.zeros([E], tl.int32)
    if BLOCKS == 0:
        total = tl.sum(mine, 0)
    else:
        total = tl.zeros([E], tl.int32)
        for first in range(0, n_blocks, BLOCKS):
            b = first + tl.arange(0, BLOCKS)
            inside = (b < n_blocks)[:, None] & (j >= 0)[None, :]
            here = tl.load(counts + b[:, None] * E + j[None, :], inside, other=0)
            total += tl.sum(here, 0)
            earlier += tl.sum(tl.where((b < i)[:, None], here, 0), 0)
    end = tl.cumsum(total, 0)
    if i == 0:
        tl.store(ends + j, end)
    rank = tl.cumsum(mine, 0) - 1 + (end - total + earlier)[None, :]
    place = tl.sum(mine * rank, 1)
    tl.store(order + place, k, k < t)


@triton.jit
def gather_kernel(
    x, order, out, other, other_out, t, m, stride, other_stride,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[i] = x[order[i]], and in a second row of programs the same of another tensor.

    Owns ROWS rows of out. Moves them once each way. Bound by bytes.
    """
    if tl.program_id(1) == 1:
        x, out, stride = other, other_out, other_stride
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    source = tl.load(order + i, i < t, other=0).to(tl.int64) * stride
    target = i.to(tl.int64) * m
    for first in range(0, m, BLOCK):
        k = first + tl.arange(0, BLOCK)
        inside = (i < t)[:, None] & (k < m)[None, :]
        v = tl.load(x + source[:, None] + k[None, :], inside, other=0.0)
        tl.store(out + target[:, None] + k[None, :], v, inside)


@triton.jit
def scatter_kernel(
    x, order, scale, out, t, m,
    HAS_SCALE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[order[i]] = x[i] scale[order[i]].

    Owns ROWS rows of x. Moves them once each way. Bound by bytes.
    """
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    place = tl.load(order + i, i < t, other=0).to(tl.int64)
    source = i.to(tl.int64) * m
    if HAS_SCALE:
        factor = tl.load(scale + place, i < t, other=0.0).to(tl.float32)
    for first in range(0, m, BLOCK):
        k = first + tl.arange(0, BLOCK)
        inside = (i < t)[:, None] & (k < m)[None, :]
        v = tl.load(x + source[:, None] + k[None, :], inside, other=0.0)
        if HAS_SCALE:
            v = (v.to(tl.float32) * factor[:, None]).to(out.dtype.element_ty)
        tl.store(out + place[:, None] * m + k[None, :], v, inside)


@triton.jit
def activate_kernel(h, out, t, f, GELU: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):
    """out = act(g) u of [g | u] = h.

    Owns BLOCK numbers of a row. Moves 3 f numbers a row. Bound by bytes. The last rows come first:
    the product before wrote them last, and the one after begins with the first, so that at both
    ends some 30 MB are still in the L2 cache.
    """
    row = (t - 1 - tl.program_id(0) // BLOCKS).to(tl.int64)
    k = tl.program_id(0) % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    inside = k < f
    g = tl.load(h + row * 2 * f + k, inside, other=0.0).to(tl.float32)
    u = tl.load(h + row * 2 * f + f + k, inside, other=0.0).to(tl.float32)
    a = activated(g, GELU)
    tl.store(out + row * f + k, (a * u).to(out.dtype.element_ty), inside)


@triton.jit
def activate_backward_kernel(
    grad, h, order, gate, grad_h, hidden, grad_gate, t, f,
    GELU: tl.constexpr, HAS_GATE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of y = gate W act(g) u: gradients of g, u and gate, and gate act(g) u for the gradient of W.

    `grad` is W^T times the gradient of y, so that its product with act(g) u is the gate's gradient.
    Owns a row; the last come first, as above. Moves 6 f numbers a row. Bound by bytes.
    """
    row = (t - 1 - tl.program_id(0)).to(tl.int64)
    token = tl.load(order + row).to(tl.int64)
    factor = 1.0
    if HAS_GATE:
        factor = tl.load(gate + token).to(tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, f, BLOCK):
        k = first + tl.arange(0, BLOCK)
        inside = k < f
        g = tl.load(h + row * 2 * f + k, inside, other=0.0).to(tl.float32)
        u = tl.load(h + row * 2 * f + f + k, inside, other=0.0).to(tl.float32)
        d = tl.load(grad + row * f + k, inside, other=0.0).to(tl.float32)
        a, slope = value_and_slope(g, GELU)
        total += d * a * u
        d *= factor
        kind = grad_h.dtype.element_ty
        tl.store(grad_h + row * 2 * f + k, (d * u * slope).to(kind), inside)
        tl.store(grad_h + row * 2 * f + f + k, (d * a).to(kind), inside)
        tl.store(hidden + row * f + k, (factor * a * u).to(kind), inside)
    if HAS_GATE:
        tl.store(grad_gate + token, tl.sum(total, 0))


@triton.jit
def few_in_kernel(
    x, order, ends, fc1, hidden, m, f, stride,
    M: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GELU: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """hidden[i] = act(g) u of [g | u] = fc1[expert] x[order[i]].

    Owns BN numbers of one expert's tokens, M at a time. Bound by the bytes of `fc1`.
    """
    expert = tl.program_id(1)
    begin = tl.load(ends + expert - 1, expert > 0, other=0)
    end = tl.load(ends + expert)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    fc1 += expert.to(tl.int64) * 2 * f * m
    for first in range(begin, end, M):
        i = first + tl.arange(0, M)
        token = tl.load(order + i, i < end, other=0).to(tl.int64)
        g, u = tl.zeros([M, BN], tl.float32), tl.zeros([M, BN], tl.float32)
        for start in range(0, m, BK):
            k = start + tl.arange(0, BK)
            inside = (n < f)[None, :] & (k < m)[:, None]
            at = fc1 + n[None, :] * m + k[:, None]
            wg, wu = tl.load(at, inside, other=0.0), tl.load(at + f * m, inside, other=0.0)
            v = tl.load(
                x + token[:, None] * stride + k[None, :],
                (i < end)[:, None] & (k < m)[None, :],
                other=0.0,
            )
            if WIDE:
                v, wg, wu = v.to(tl.float32), wg.to(tl.float32), wu.to(tl.float32)
                g = tl.dot(v, wg, g, input_precision="ieee")
                u = tl.dot(v, wu, u, input_precision="ieee")
            else:
                g, u = tl.dot(v, wg, g), tl.dot(v, wu, u)
        a = activated(g, GELU)
        out = hidden + i[:, None].to(tl.int64) * f + n[None, :]
        whole = (i < end)[:, None] & (n < f)[None, :]
        tl.store(out, (a * u).to(out.dtype.element_ty), whole)


@triton.jit
def few_out_kernel(
    hidden, order, ends, fc2, gate, y, m, f,
    M: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, HAS_GATE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """y[order[i]] = gate fc2[expert] hidden[i].

    Owns BN numbers of one expert's tokens, M at a time. Bound by the bytes of `fc2`.
    """
    expert = tl.program_id(1)
    begin = tl.load(ends + expert - 1, expert > 0, other=0)
    end = tl.load(ends + expert)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    fc2 += expert.to(tl.int64) * f * m
    for first in range(begin, end, M):
        i = first + tl.arange(0, M)
        total = tl.zeros([M, BN], tl.float32)
        for start in range(0, f, BK):
            k = start + tl.arange(0, BK)
            w = tl.load(
                fc2 + n[None, :] * f + k[:, None], (n < m)[None, :] & (k < f)[:, None], other=0.0
            )
            v = tl.load(
                hidden + i[:, None].to(tl.int64) * f + k[None, :],
                (i < end)[:, None] & (k < f)[None, :],
                other=0.0,
            )
            if WIDE:
                v, w = v.to(tl.float32), w.to(tl.float32)
                total = tl.dot(v, w, total, input_precision="ieee")
            else:
                total = tl.dot(v, w, total)
        token = tl.load(order + i, i < end, other=0).to(tl.int64)
        if HAS_GATE:
            total *= tl.load(gate + token, i < end, other=0.0).to(tl.float32)[:, None]
        out = y + token[:, None] * m + n[None, :]
        tl.store(out, total.to(out.dtype.element_ty), (i < end)[:, None] & (n < m)[None, :])
