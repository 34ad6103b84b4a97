"""Triton kernels of `activate`, and the functions themselves for kernels that have them inside.

Letters: f numbers of a row's result. Of GATED rows of h the first f are g, the next f u. Everything
is counted in units of UNIT numbers, which divide f and the strides of rows: so the compiler knows
that a unit is moved as a whole, and dividing by f is done once for each. The last units come first:
a product wrote them last, so that they are still in the L2 cache, and the next one begins with the
first.
"""

import triton
import triton.language as tl

_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def activated(g, GELU: tl.constexpr):
    """act(g), in float32."""
    if GELU:
        return g * (0.5 * (1 + tl.erf(g * 0.7071067811865476)))
    return g / (1 + tl.exp2(-_LOG2E * g))


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
def _units(n, f, UNIT: tl.constexpr, UNITS: tl.constexpr, LONG: tl.constexpr):
    """Of this program: each unit's row, the numbers in there, (UNITS, UNIT), and whether it is."""
    i = tl.num_programs(0) - 1 - tl.program_id(0)
    if LONG:
        i = i.to(tl.int64)
    q = i * UNITS + tl.arange(0, UNITS)
    k = (q % f * UNIT)[:, None] + tl.arange(0, UNIT)[None, :]
    return (q // f).to(tl.int64)[:, None], k, (q < n)[:, None]


@triton.jit
def activate_kernel(
    h, y, n, f, stride,
    GELU: tl.constexpr, GATED: tl.constexpr,
    UNIT: tl.constexpr, UNITS: tl.constexpr, LONG: tl.constexpr,
):  # fmt: skip
    """y = act(g) u, or act(h).

    Owns UNITS of the n units of y. On chip: these. Moves 3 numbers for one of y, or 2. Bound by
    bytes.
    """
    row, k, inside = _units(n, f, UNIT, UNITS, LONG)
    at = h + row * stride * UNIT + k
    a, _ = value_and_slope(tl.load(at, inside, other=0.0).to(tl.float32), GELU)
    if GATED:
        a *= tl.load(at + f * UNIT, inside, other=0.0).to(tl.float32)
    tl.store(y + row * f * UNIT + k, a.to(y.dtype.element_ty), inside)


@triton.jit
def activate_backward_kernel(
    grad, h, grad_h, n, f, grad_stride, stride,
    GELU: tl.constexpr, GATED: tl.constexpr,
    UNIT: tl.constexpr, UNITS: tl.constexpr, LONG: tl.constexpr,
):  # fmt: skip
    """grad_h = [grad u act'(g) | grad act(g)], or grad act'(h).

    Owns UNITS of the n units of grad. On chip: these. Moves 5 numbers for one of grad, or 3. Bound
    by bytes.
    """
    row, k, inside = _units(n, f, UNIT, UNITS, LONG)
    at = h + row * stride * UNIT + k
    kind = grad_h.dtype.element_ty
    a, slope = value_and_slope(tl.load(at, inside, other=0.0).to(tl.float32), GELU)
    d = tl.load(grad + row * grad_stride * UNIT + k, inside, other=0.0).to(tl.float32)
    if GATED:
        u = tl.load(at + f * UNIT, inside, other=0.0).to(tl.float32)
        to = grad_h + row * (2 * f) * UNIT + k
        tl.store(to, (d * u * slope).to(kind), inside)
        tl.store(to + f * UNIT, (d * a).to(kind), inside)
    else:
        tl.store(grad_h + row * f * UNIT + k, (d * slope).to(kind), inside)
