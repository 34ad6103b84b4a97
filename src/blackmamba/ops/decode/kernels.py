"""Triton kernels of a one-token step for few sequences: matrix times vector, and all between.

Weights are what such a step reads, each once; everything else fits in the L2 cache. Activations
are float32 in (b, width) buffers. A program of a product owns BN rows of the weight, loads them
whole, so that all its memory requests are under way at once, and multiplies them with every
sequence's vector.

With PDL a kernel starts while the one before still runs, loads the weights that it will need, and
waits for the other only then: NVIDIA's programmatic dependent launch, for Hopper and newer.

Letters: b sequences, m d_model, d d_inner, r dt_rank, n d_state, f d_expert, e experts.
"""

import triton
import triton.language as tl
from triton.language.extra import cuda

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _begin(PDL: tl.constexpr):
    """The next kernel may start."""
    if PDL:
        cuda.gdc_launch_dependents()


@triton.jit
def _ready(PDL: tl.constexpr):
    """What the kernels before have written is there."""
    if PDL:
        cuda.gdc_wait()


@triton.jit
def _silu(x):
    return x / (1 + tl.exp2(-LOG2E * x))


@triton.jit
def _normed(x, weight, bias, eps, width, k, LAYER: tl.constexpr):
    """RMSNorm, or LayerNorm, of one vector."""
    inside = k < width
    v = tl.load(x + k, inside, other=0.0).to(tl.float32)
    if LAYER:
        v = tl.where(inside, v - tl.sum(v, 0) / width, 0.0)
    v *= tl.rsqrt(tl.sum(v * v, 0) / width + eps) * tl.load(weight + k, inside, other=0.0)
    if LAYER:
        v += tl.load(bias + k, inside, other=0.0)
    return v


@triton.jit
def embed_kernel(ids, table, x, m, BK: tl.constexpr, PDL: tl.constexpr):
    """x[b] = table[ids[b]]. Owns a row."""
    _begin(PDL)
    _ready(PDL)
    b = tl.program_id(0)
    k = tl.arange(0, BK)
    token = tl.load(ids + b)
    v = tl.load(table + token * m + k, k < m, other=0.0).to(tl.float32)
    tl.store(x + b * m + k, v, k < m)


@triton.jit
def norm_kernel(
    x, weight, bias, eps, y, m,
    BK: tl.constexpr, NORM: tl.constexpr, LAYER: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y = norm(x). Owns a row. Bound by its launch."""
    _begin(PDL)
    _ready(PDL)
    b = tl.program_id(0)
    k = tl.arange(0, BK)
    if NORM:
        v = _normed(x + b * m, weight, bias, eps, m, k, LAYER)
    else:
        v = tl.load(x + b * m + k, k < m, other=0.0)
    tl.store(y + b * m + k, v.to(y.dtype.element_ty), k < m)


@triton.jit
def norm_linear_kernel(
    x, norm_weight, norm_bias, eps, weight, out, rows, m,
    conv_weight, conv_bias, conv_state, d,
    B: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    NORM: tl.constexpr, LAYER: tl.constexpr, CONV: tl.constexpr, TAPS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """out = weight norm(x); with CONV the first d rows go on through the convolution and SiLU.

    Owns BN rows. Bound by the bytes of `weight`.
    """
    _begin(PDL)
    row = tl.program_id(0) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    whole = (row < rows)[:, None] & (k < m)[None, :]
    w = tl.load(weight + row[:, None].to(tl.int64) * m + k[None, :], whole, other=0.0)
    _ready(PDL)
    w = w.to(tl.float32)
    for b in tl.static_range(B):
        if NORM:
            v = _normed(x + b * m, norm_weight, norm_bias, eps, m, k, LAYER)
        else:
            v = tl.load(x + b * m + k, k < m, other=0.0)
        y = tl.sum(w * v[None, :], 1)
        if CONV:
            is_x = row < d
            state = conv_state + (b * d + row) * (TAPS - 1)
            tap = conv_weight + row * TAPS
            z = tl.load(conv_bias + row, is_x, other=0.0)
            z += tl.load(tap + TAPS - 1, is_x, other=0.0) * y
            for i in tl.static_range(TAPS - 1):
                z += tl.load(tap + i, is_x, other=0.0) * tl.load(state + i, is_x, other=0.0)
            for i in tl.static_range(TAPS - 2):
                tl.store(state + i, tl.load(state + i + 1, is_x, other=0.0), is_x)
            tl.store(state + TAPS - 2, y, is_x)
            y = tl.where(is_x, _silu(z), y)
        tl.store(out + b * rows + row, y, row < rows)


@triton.jit
def add_linear_kernel(
    y, weight, x, rows, width, ids, gate, y_stride,
    B: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, ROUTED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """x += weight y; ROUTED: weight[ids[b]], times gate[b], and a program has one sequence.

    Owns BN rows. Bound by the bytes of `weight`.
    """
    _begin(PDL)
    row = tl.program_id(0) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    whole = (row < rows)[:, None] & (k < width)[None, :]
    first = 0
    scale = 1.0
    if ROUTED:  # chosen before `expert_in_kernel` let this one start
        first = tl.program_id(1)
        weight += tl.load(ids + first).to(tl.int64) * rows * width
        scale = tl.load(gate + first)
    w = tl.load(weight + row[:, None].to(tl.int64) * width + k[None, :], whole, other=0.0)
    _ready(PDL)
    w = w.to(tl.float32)
    for i in tl.static_range(B):
        b = first + i
        v = tl.load(y + b * y_stride + k, k < width, other=0.0)
        at = x + b * rows + row
        total = tl.load(at, row < rows, other=0.0) + scale * tl.sum(w * v[None, :], 1)
        tl.store(at, total, row < rows)


@triton.jit
def update_kernel(
    xz, dbc, dt, dt_weight, dt_bias, A2, D, state, y, d, r, n, dbc_stride,
    BD: tl.constexpr, BR: tl.constexpr, N: tl.constexpr, PRODUCT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """With delta = softplus(raw + bias): h = 2^(delta A2) h + delta B x, and
    y = (C h + D x) silu(z). raw = dt_weight dt if PRODUCT, where dt is the first r of dbc; else dt.

    Owns BD channels of one sequence. Bound by the bytes of `dt_weight` and `state`.
    """
    _begin(PDL)
    b = tl.program_id(1)
    c = tl.program_id(0) * BD + tl.arange(0, BD)
    j, k = tl.arange(0, BR), tl.arange(0, N)
    here = c < d
    dbc += b * dbc_stride
    raw = tl.load(dt_bias + c, here, other=0.0)
    whole = here[:, None] & (k < n)[None, :]
    rates = tl.load(A2 + c[:, None] * n + k[None, :], whole, other=0.0)
    if PRODUCT:
        w = tl.load(
            dt_weight + c[:, None] * r + j[None, :], here[:, None] & (j < r)[None, :], other=0.0
        )
        _ready(PDL)
        rank = tl.load(dbc + j, j < r, other=0.0).to(tl.float32)
        raw += tl.sum(w.to(tl.float32) * rank[None, :], 1)
    else:
        _ready(PDL)
        raw += tl.load(dt + b * d + c, here, other=0.0).to(tl.float32)
    e = tl.exp2(-LOG2E * tl.abs(raw))
    # where e is small 1 + e would round it away
    small = e * (1 - e * (0.5 - e * (0.33333334 - 0.25 * e)))
    delta = tl.maximum(raw, 0.0) + tl.where(e < 0.03125, small, tl.log2(1 + e) * LN2)
    x = tl.load(xz + b * 2 * d + c, here, other=0.0).to(tl.float32)
    z = tl.load(xz + b * 2 * d + d + c, here, other=0.0).to(tl.float32)
    B = tl.load(dbc + r + k, k < n, other=0.0).to(tl.float32)
    C = tl.load(dbc + r + n + k, k < n, other=0.0).to(tl.float32)
    a = tl.exp2(delta[:, None] * rates)
    at = state + (b * d + c[:, None]) * n + k[None, :]
    h = a * tl.load(at, whole, other=0.0) + (delta * x)[:, None] * B[None, :]
    tl.store(at, h, whole)
    out = tl.sum(h * C[None, :], 1) + tl.load(D + c, here, other=0.0) * x
    tl.store(y + b * d + c, out * _silu(z), here)


@triton.jit
def route_kernel(
    x, norm_weight, eps, weight, bias, ids, gate, m, e,
    BE: tl.constexpr, BK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """ids: the expert of the largest logit, the first of equals; gate: the sigmoid of that.

    Owns one sequence. Bound by its launch.
    """
    _begin(PDL)
    b = tl.program_id(0)
    k, j = tl.arange(0, BK), tl.arange(0, BE)
    w = tl.load(
        weight + j[:, None] * m + k[None, :], (j < e)[:, None] & (k < m)[None, :], other=0.0
    )  # of the first experts, on their way while x is normed
    _ready(PDL)
    v = _normed(x + b * m, norm_weight, norm_weight, eps, m, k, False)
    best = -float("inf")
    chosen = 0
    for first in range(0, e, BE):
        logits = tl.sum(w * v[None, :], 1) + tl.load(bias + j, j < e, other=0.0)
        logits = tl.where(j < e, logits, -float("inf"))
        top = tl.max(logits, 0)
        at = first + tl.argmax(logits, 0)
        chosen = tl.where(top > best, at, chosen)
        best = tl.maximum(top, best)
        j += BE
        whole = (j < e)[:, None] & (k < m)[None, :]
        w = tl.load(weight + j[:, None] * m + k[None, :], whole, other=0.0)
    tl.store(ids + b, chosen)
    tl.store(gate + b, 1 / (1 + tl.exp2(-LOG2E * best)))


@triton.jit
def expert_in_kernel(
    x, norm_weight, eps, weight, ids, hidden, m, f,
    BN: tl.constexpr, BK: tl.constexpr, GELU: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """hidden = act(g) u of [g | u] = weight[ids[b]] norm(x).

    Owns BN numbers of one sequence. Bound by the bytes of `weight`.
    """
    _ready(PDL)
    _begin(PDL)  # not before: the next kernel reads the choice without waiting for this one
    b = tl.program_id(1)
    row = tl.program_id(0) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    whole = (row < f)[:, None] & (k < m)[None, :]
    weight += tl.load(ids + b).to(tl.int64) * 2 * f * m
    at = weight + row[:, None] * m + k[None, :]
    wg = tl.load(at, whole, other=0.0).to(tl.float32)
    wu = tl.load(at + f * m, whole, other=0.0).to(tl.float32)
    v = _normed(x + b * m, norm_weight, norm_weight, eps, m, k, False)
    g, u = tl.sum(wg * v[None, :], 1), tl.sum(wu * v[None, :], 1)
    if GELU:
        a = 0.5 * g * (1 + tl.erf(g * 0.7071067811865476))
    else:
        a = _silu(g)
    tl.store(hidden + b * f + row, a * u, row < f)


@triton.jit
def project_kernel(
    xz, weight, out, rows, d, out_stride, B: tl.constexpr, BK: tl.constexpr, PDL: tl.constexpr
):
    """out = weight x, where x is the first half of each row of xz.

    Owns a row of the weight. Bound by its launch.
    """
    _begin(PDL)
    row = tl.program_id(0)
    k = tl.arange(0, BK)
    w = tl.load(weight + row * d + k, k < d, other=0.0).to(tl.float32)
    _ready(PDL)
    for b in tl.static_range(B):
        v = tl.load(xz + b * 2 * d + k, k < d, other=0.0)
        tl.store(out + b * out_stride + row, tl.sum(w * v, 0))


@triton.jit
def conv_kernel(xz, weight, bias, state, d, TAPS: tl.constexpr, BD: tl.constexpr):
    """The first half of each row of xz through the convolution and SiLU, in place.

    Owns BD channels of one sequence. Bound by the bytes of `state`.
    """
    b = tl.program_id(1)
    c = tl.program_id(0) * BD + tl.arange(0, BD)
    here = c < d
    at = xz + b * 2 * d + c
    x = tl.load(at, here, other=0.0).to(tl.float32)
    state += (b * d + c) * (TAPS - 1)
    y = tl.load(bias + c, here, other=0.0) + x * tl.load(weight + c * TAPS + TAPS - 1, here)
    for i in tl.static_range(TAPS - 1):
        old = tl.load(state + i, here, other=0.0)
        y += tl.load(weight + c * TAPS + i, here, other=0.0) * old
        if i > 0:
            tl.store(state + i - 1, old, here)
    tl.store(state + TAPS - 2, x, here)
    tl.store(at, _silu(y).to(at.dtype.element_ty), here)


@triton.jit
def greedy_kernel(logits, ids, choice, v, stride, size, BK: tl.constexpr, PDL: tl.constexpr):
    """choice[0, b] = ids[b] = the first of the largest logits; choice[1, b]: 1 if that is finite.

    Owns one sequence; ids that are not usable are 0. Bound by latency: v numbers on one processor.
    """
    _begin(PDL)
    _ready(PDL)
    b = tl.program_id(0)
    k = tl.arange(0, BK)
    best = tl.full([BK], -float("inf"), tl.float32)
    at = tl.zeros([BK], tl.int32)
    bad = tl.zeros([BK], tl.int32)
    for first in range(0, v, BK):
        x = tl.load(logits + b * stride + first + k, first + k < v, other=-float("inf"))
        bad |= (x != x).to(tl.int32)
        at = tl.where(x > best, first + k, at)
        best = tl.maximum(best, x)
    top = tl.max(best, 0)
    chosen = tl.min(tl.where(best == top, at, v), 0)
    usable = (top > -float("inf")) & (top < float("inf")) & (tl.max(bad, 0) == 0)
    chosen = tl.where(usable, chosen, 0).to(tl.int64)
    tl.store(ids + b, chosen)
    tl.store(choice + b, chosen)
    tl.store(choice + size + b, usable.to(tl.int64))
