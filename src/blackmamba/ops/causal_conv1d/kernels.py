"""Triton kernels of the causal convolution; gpu.py launches them.

A program owns BD channels of one row of the batch and walks over a chunk of its tokens, with the
last inputs (backwards also the last gradients) in registers: every number is read once, but for k -
1 tokens where chunks meet.

Letters: b batch, l sequence, d d_inner, k width.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _input(x, before, t, l, x_l, d, c, here, K: tl.constexpr, HAS_BEFORE: tl.constexpr):
    """Input t, or of what came before it where t < 0; 0 outside."""
    value = tl.load(x + tl.cast(t, tl.int64) * x_l + c, here & (t >= 0) & (t < l), other=0.0)
    value = value.to(tl.float32)
    if HAS_BEFORE:
        place = before + c * (K - 1) + (K - 1 + t)
        value += tl.load(place, here & (t < 0), other=0.0).to(tl.float32)
    return value


@triton.jit
def _document(seq, t, l, s_l):
    """Which document token t is of; what came before the row is of its first one."""
    return tl.load(seq + tl.minimum(tl.maximum(t, 0), l - 1) * s_l)


@triton.jit
def _weighted(inputs, weights, bias, documents, K: tl.constexpr, HAS_SEQ: tl.constexpr):
    """The sum before the activation; inputs[K - 1] is the newest."""
    total = bias + weights[K - 1] * inputs[K - 1]
    for j in tl.static_range(K - 1):
        if HAS_SEQ:
            total += weights[j] * tl.where(documents[j] == documents[K - 1], inputs[j], 0.0)
        else:
            total += weights[j] * inputs[j]
    return total


@triton.jit
def conv1d_forward_kernel(
    x, weight, bias, before, seq, y, last, lengths, l, d, chunk, x_b, x_l, s_b, s_l,
    BD: tl.constexpr, K: tl.constexpr, U: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_BEFORE: tl.constexpr, HAS_SEQ: tl.constexpr, SILU: tl.constexpr,
    LAST: tl.constexpr = False, HAS_LENGTHS: tl.constexpr = False,
):  # fmt: skip
    """y = silu(weights times the last K inputs); LAST: the row's last K - 1 real inputs, too.

    Owns BD channels of a row over one chunk. Keeps weights and the last K inputs. Moves x and y
    once. Bound by bytes.
    """
    c = tl.program_id(0) * BD + tl.arange(0, BD)
    begin = tl.program_id(1) * chunk
    row = tl.program_id(2).to(tl.int64)
    here = c < d
    x += row * x_b
    y += row * l * d
    before += row * d * (K - 1)
    seq += row * s_b
    if LAST:  # noqa: SIM102 # known when it is compiled, unlike the other
        if tl.program_id(1) == 0:
            n = tl.load(lengths + row).to(tl.int32) if HAS_LENGTHS else l
            for j in tl.static_range(K - 1):
                value = _input(x, before, n - (K - 1) + j, l, x_l, d, c, here, K, HAS_BEFORE)
                at = last + row * d * (K - 1) + c * (K - 1) + j
                tl.store(at, value.to(last.dtype.element_ty), here)
    w = ()
    for j in tl.static_range(K):
        w += (tl.load(weight + c * K + j, here, other=0.0).to(tl.float32),)
    b = (
        tl.load(bias + c, here, other=0.0).to(tl.float32)
        if HAS_BIAS
        else tl.zeros([BD], tl.float32)
    )
    inputs = ()
    documents = ()
    for j in tl.static_range(K - 1):
        t = begin - (K - 1) + j
        inputs += (_input(x, before, t, l, x_l, d, c, here, K, HAS_BEFORE),)
        documents += (_document(seq, t, l, s_l) if HAS_SEQ else 0,)
    end = tl.minimum(begin + chunk, l)
    for t0 in range(begin, end, U):
        new = ()
        for i in tl.static_range(U):  # all loads first
            at = x + tl.cast(t0 + i, tl.int64) * x_l + c
            new += (tl.load(at, here & (t0 + i < end), other=0.0).to(tl.float32),)
        for i in tl.static_range(U):
            inputs += (new[i],)
            documents += (_document(seq, t0 + i, l, s_l) if HAS_SEQ else 0,)
            out = _weighted(inputs, w, b, documents, K, HAS_SEQ)
            if SILU:
                out = out / (1 + tl.exp2(out * -LOG2E))
            tl.store(y + tl.cast(t0 + i, tl.int64) * d + c, out, here & (t0 + i < end))
            inputs = inputs[1:]
            documents = documents[1:]


@triton.jit
def conv1d_backward_kernel(
    x, weight, bias, before, seq, grad_y, grad_x, grad_before, sums,
    l, d, chunk, x_b, x_l, s_b, s_l, gy_b, gy_l, gx_b, gx_l,
    BD: tl.constexpr, K: tl.constexpr, U: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_BEFORE: tl.constexpr, HAS_SEQ: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """Gradients of x and of what came before it; of weight and bias as sums over the chunk, (K + 1,
    d).

    Owns BD channels of a row over one chunk: the gradients of its inputs, which end with those of
    the K - 1 tokens behind it. Keeps weights, their gradients, the last K inputs and gradients.
    Moves x and both gradients once. Bound by bytes.
    """
    c = tl.program_id(0) * BD + tl.arange(0, BD)
    piece = tl.program_id(1)
    begin = piece * chunk
    row = tl.program_id(2).to(tl.int64)
    here = c < d
    x += row * x_b
    grad_y += row * gy_b
    grad_x += row * gx_b
    before += row * d * (K - 1)
    grad_before += row * d * (K - 1)
    seq += row * s_b
    w = ()
    of_w = ()
    for j in tl.static_range(K):
        w += (tl.load(weight + c * K + j, here, other=0.0).to(tl.float32),)
        of_w += (tl.zeros([BD], tl.float32),)
    b = (
        tl.load(bias + c, here, other=0.0).to(tl.float32)
        if HAS_BIAS
        else tl.zeros([BD], tl.float32)
    )
    of_b = tl.zeros([BD], tl.float32)
    inputs = ()
    grads = ()  # of the sums before the activation; those of earlier chunks' tokens are theirs
    documents = ()
    for j in tl.static_range(K - 1):
        t = begin - (K - 1) + j
        inputs += (_input(x, before, t, l, x_l, d, c, here, K, HAS_BEFORE),)
        grads += (tl.zeros([BD], tl.float32),)
        documents += (_document(seq, t, l, s_l) if HAS_SEQ else 0,)
    end = tl.minimum(begin + chunk, l)
    for t0 in range(begin, end + K - 1, U):
        new = ()
        given = ()
        for i in tl.static_range(U):
            t = tl.cast(t0 + i, tl.int64)
            inside = here & (t0 + i < l) & (t0 + i < end + K - 1)
            new += (tl.load(x + t * x_l + c, inside, other=0.0).to(tl.float32),)
            given += (tl.load(grad_y + t * gy_l + c, inside, other=0.0).to(tl.float32),)
        for i in tl.static_range(U):
            t = t0 + i
            inputs += (new[i],)
            documents += (_document(seq, t, l, s_l) if HAS_SEQ else 0,)
            g = given[i]
            if SILU:
                out = _weighted(inputs, w, b, documents, K, HAS_SEQ)
                s = 1 / (1 + tl.exp2(out * -LOG2E))
                g *= s + out * s * (1 - s)
            own = tl.where(t < end, g, 0.0)
            grads += (g,)
            of_b += own
            sum_of_w = ()
            g_x = w[K - 1] * grads[0]
            for j in tl.static_range(K):
                value = inputs[j]
                if HAS_SEQ:
                    value = tl.where(documents[j] == documents[K - 1], value, 0.0)
                sum_of_w += (of_w[j] + own * value,)
                if j > 0:
                    later = grads[j]
                    if HAS_SEQ:
                        later = tl.where(documents[j] == documents[0], later, 0.0)
                    g_x += w[K - 1 - j] * later
            of_w = sum_of_w
            to = t - (K - 1)  # the input that no later token needs
            at = grad_x + tl.cast(to, tl.int64) * gx_l + c
            tl.store(at, g_x, here & (to >= begin) & (to < end))
            if HAS_BEFORE:
                tl.store(grad_before + c * (K - 1) + t, g_x, here & (to < 0))
            inputs = inputs[1:]
            grads = grads[1:]
            documents = documents[1:]
    sums += (row * tl.num_programs(1) + piece) * (K + 1) * d + c
    for j in tl.static_range(K):
        tl.store(sums + j * d, of_w[j], here)
    tl.store(sums + K * d, of_b, here)
