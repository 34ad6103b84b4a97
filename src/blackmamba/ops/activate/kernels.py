"""Triton kernels of `activate`.

Letters: t rows of h, f numbers of a row's result. Of GATED rows the first f are g, the next f u.
`f` and the strides of rows are counted in UNIT numbers, so that the compiler knows what divides
them and moves whole words. The last rows come first: a product wrote them last, so that they are
still in the L2 cache, and the next one begins with the first.
"""

import triton
import triton.language as tl

_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def value_and_slope(g, GELU: tl.constexpr):
    """act(g) and its derivative, in float32."""
    if GELU:
        below = 0.5 * (1 + tl.erf(g * 0.7071067811865476))  # a normal number is, by so much
        density = 0.3989422804014327 * tl.exp2(-0.5 * _LOG2E * g * g)
        return g * below, below + g * density
    s = 1 / (1 + tl.exp2(-_LOG2E * g))
    return g * s, s * (1 + g * (1 - s))


@triton.jit
def activate_kernel(
    h, y, t, f, stride,
    GELU: tl.constexpr, GATED: tl.constexpr,
    UNIT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y = act(g) u, or act(h).

    Owns BLOCK numbers of ROWS rows. On chip: these. Moves 3 numbers for one of y, or 2. Bound by
    bytes.
    """
    f *= UNIT
    row = (t - 1 - tl.program_id(0).to(tl.int64) * ROWS - tl.arange(0, ROWS))[:, None]
    k = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    inside = (row >= 0) & (k < f)
    at = h + row * stride * UNIT + k
    a, _ = value_and_slope(tl.load(at, inside, other=0.0).to(tl.float32), GELU)
    if GATED:
        a *= tl.load(at + f, inside, other=0.0).to(tl.float32)
    tl.store(y + row * f + k, a.to(y.dtype.element_ty), inside)


@triton.jit
def activate_backward_kernel(
    grad, h, grad_h, t, f, grad_stride, stride,
    GELU: tl.constexpr, GATED: tl.constexpr,
    UNIT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """grad_h = [grad u act'(g) | grad act(g)], or grad act'(h).

    Owns BLOCK numbers of ROWS rows. On chip: these. Moves 5 numbers for one of grad, or 3. Bound
    by bytes.
    """
    f *= UNIT
    row = (t - 1 - tl.program_id(0).to(tl.int64) * ROWS - tl.arange(0, ROWS))[:, None]
    k = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    inside = (row >= 0) & (k < f)
    at = h + row * stride * UNIT + k
    kind = grad_h.dtype.element_ty
    a, slope = value_and_slope(tl.load(at, inside, other=0.0).to(tl.float32), GELU)
    from_y = grad + row * grad_stride * UNIT + k
    d = tl.load(from_y, inside, other=0.0).to(tl.float32)
    if GATED:
        u = tl.load(at + f, inside, other=0.0).to(tl.float32)
        to = grad_h + row * (2 * f) + k
        tl.store(to, (d * u * slope).to(kind), inside)
        tl.store(to + f, (d * a).to(kind), inside)
    else:
        tl.store(grad_h + row * f + k, (d * slope).to(kind), inside)
