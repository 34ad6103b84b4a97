"""The kernels of convolution and scan with the two small products between them, and their gradient.

The backward pass writes the gradients of x and z into halves of one tensor, those of dt, B and C
into columns of another, and adds what comes to x from x_proj in that product itself: nothing is
copied or added up by a kernel of its own.

Letters: b batch, l sequence, d d_inner, n d_state, r dt_rank, k d_conv.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from blackmamba.ops.causal_conv1d import gpu as conv
from blackmamba.ops.mamba_mixer import hopper
from blackmamba.ops.prompt.gpu import fill_pads_, last_output
from blackmamba.ops.selective_scan import gpu as scan


def mamba_mixer_gpu(
    xz: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    x_proj: Tensor,
    dt_proj: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    seq_idx: Tensor | None,
    recompute: bool,
) -> tuple[Tensor, Tensor]:
    """`mamba_mixer`; the products in xz's dtype, all else in float32."""
    inputs = (xz, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A, D)
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
    y, final_state, *_ = _forward(*inputs, seq_idx, keep, keep and not recompute)
    return y, final_state


def _aligned(like: Tensor, *shape: int) -> Tensor:
    """Memory of this shape whose rows begin at whole 16 bytes: the library's products of other rows
    are several times as slow."""
    return like.new_empty(*shape[:-1], -(-shape[-1] // 8) * 8)[..., : shape[-1]]


def _with_aligned_rows(dt_proj: Tensor) -> Tensor:
    """dt_proj (d, r), or a copy whose rows begin at whole 16 bytes; behind them is anything."""
    if dt_proj.shape[1] % 8 == 0:
        return dt_proj
    return _aligned(dt_proj, *dt_proj.shape).copy_(dt_proj)


def _products(x: Tensor, x_proj: Tensor, dt_proj: Tensor) -> tuple[Tensor, Tensor]:
    """What x_proj makes of x (b, l, d), (b, l, r + 2 n), and what dt_proj makes of that, (b, l,
    d)."""
    columns = _aligned(x, *x.shape[:2], len(x_proj))
    torch.mm(x.flatten(0, 1), x_proj.t(), out=columns.flatten(0, 1))
    low = columns[..., : dt_proj.shape[1]]
    return columns, torch.mm(low.flatten(0, 1), dt_proj.t()).view(x.shape)


def _parts(columns: Tensor, r: int, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """dt, B and C, of columns (b, l, r + 2 n)."""
    return columns[..., :r], columns[..., r : r + n], columns[..., r + n :]


@torch.library.custom_op("blackmamba::mamba_mixer", mutates_args=())
def _forward(
    xz: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    x_proj: Tensor,
    dt_proj: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    seq_idx: Tensor | None,
    keep: bool,
    keep_x: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y, the final state and, if `keep`, for the backward pass: x behind the convolution (only if
    `keep_x`), x_proj's product, dt, and states."""
    (d, r), n = dt_proj.shape, A.shape[1]
    z = xz[..., d:]
    x = xz[..., :d]
    weights = conv_weight, conv_bias, x_proj, _with_aligned_rows(dt_proj)
    if hopper.fits(x, *weights) and hopper.is_enough(x):
        x, columns, dt, _ = hopper.projected(x, *weights, seq_idx=seq_idx)
    else:
        x = conv._forward(x, conv_weight, conv_bias, None, seq_idx, True)
        columns, dt = _products(x, *weights[2:])
    _, B, C = _parts(columns, r, n)
    y, final_state, starts = scan._forward(x, dt, A, B, C, D, z, dt_bias, None, seq_idx, True, keep)
    if not keep:
        columns, dt = x.new_empty(0), x.new_empty(0)
    return y, final_state, x if keep_x else x.new_empty(0), columns, dt, starts


@torch.library.custom_op("blackmamba::mamba_mixer_backward", mutates_args=())
def _backward(
    grad_y: Tensor,
    grad_final: Tensor | None,
    xz: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    x_proj: Tensor,
    dt_proj: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    seq_idx: Tensor | None,
    x: Tensor,
    columns: Tensor,
    dt: Tensor,
    starts: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the eight inputs."""
    (d, r), n = dt_proj.shape, A.shape[1]
    inputs = (xz, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A, D)
    g_xz, g_conv_weight, g_conv_bias, g_x_proj, g_dt_proj, g_dt_bias, g_A, g_D = (
        t.new_empty(t.shape) for t in inputs
    )
    _, B, C = _parts(columns, r, n)
    if not x.numel():
        x = conv._forward(xz[..., :d], conv_weight, conv_bias, None, seq_idx, True)
    g_x, g_dt = (t.new_empty(t.shape) for t in (x, dt))
    g_columns = _aligned(columns, *columns.shape)
    g_low, g_B, g_C = _parts(g_columns, r, n)
    scan.backward_into(
        (g_x, g_dt, g_A, g_B, g_C, g_D, g_xz[..., d:], g_dt_bias, g_A),
        grad_y,
        grad_final,
        x,
        dt,
        A,
        B,
        C,
        D,
        xz[..., d:],
        dt_bias,
        None,
        seq_idx,
        starts,
        True,
    )
    x_td, columns_tc, g_columns_tc = (t.flatten(0, 1) for t in (x, columns, g_columns))
    g_dt_td = g_dt.flatten(0, 1)
    narrow = _with_aligned_rows(dt_proj)
    g_narrow = g_dt_proj if narrow is dt_proj else _aligned(dt_proj, d, r)
    torch.mm(g_dt_td, narrow, out=g_low.flatten(0, 1))
    torch.mm(g_dt_td.t(), columns_tc[:, :r], out=g_narrow)
    if g_narrow is not g_dt_proj:
        g_dt_proj.copy_(g_narrow)
    torch.mm(g_columns_tc.t(), x_td, out=g_x_proj)
    g_x.flatten(0, 1).addmm_(g_columns_tc, x_proj)
    conv.backward_into(
        (g_xz[..., :d], g_conv_weight, g_conv_bias, g_conv_bias),
        g_x,
        xz[..., :d],
        conv_weight,
        conv_bias,
        None,
        seq_idx,
        True,
    )
    return g_xz, g_conv_weight, g_conv_bias, g_x_proj, g_dt_proj, g_dt_bias, g_A, g_D


# ---- without a gradient -------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class PromptWeights:
    """What `mamba_mixer_of_prompt` reads, laid out for it once."""

    conv_weight: Tensor
    """(d, k), in the products' dtype, as the next two."""
    conv_bias: Tensor
    """(d,)."""
    x_proj: Tensor
    """(r + 2 n, d)."""
    dt_proj: Tensor
    """(d, r), rows of which begin at whole 16 bytes."""
    dt_bias: Tensor
    """(d,), float32, as all that follow."""
    A: Tensor
    """(d, n), negative."""
    D: Tensor
    """(d,)."""

    @staticmethod
    def of(
        conv_weight: Tensor,
        conv_bias: Tensor,
        x_proj: Tensor,
        dt_proj: Tensor,
        dt_bias: Tensor,
        A: Tensor,
        D: Tensor,
        dtype: torch.dtype,
    ) -> "PromptWeights":
        """Of the weights of `mamba_mixer`, for products in `dtype`."""
        aligned = _with_aligned_rows(dt_proj.to(dtype).contiguous())
        narrow = (t.to(dtype).contiguous() for t in (conv_weight, conv_bias, x_proj))
        wide = (t.float().contiguous() for t in (dt_bias, A, D))
        conv_weight, conv_bias, x_proj = narrow
        return PromptWeights(conv_weight, conv_bias, x_proj, aligned, *wide)


def mamba_mixer_of_prompt(
    xz: Tensor,
    weights: PromptWeights,
    before: Tensor | None,
    first: Tensor | None,
    lengths: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`mamba_mixer` of rows that go on, without a gradient.

    Args:
        xz: (b, l, 2 d), columns [x | z], contiguous; l is at least 1.
        before: (b, d, k - 1), the convolution's inputs before x, in xz's dtype; None: zeros.
        first: (b, d, n), the state before x; None: zeros.
        lengths: (b,) int64, at least 0: rows are right-padded; a pad changes no memory.
    Returns:
        y (b, l, d), which means nothing at pads, and the new memory of convolution and scan.
    """
    x, z = xz.chunk(2, dim=-1)
    x, dt, B, C, last = _projected(x, weights, before, lengths)
    y, final_state, _ = scan._forward(
        x, dt, weights.A, B, C, weights.D, z, weights.dt_bias, first, None, True, False
    )
    return y, last, final_state


def mamba_mixer_of_last(
    x: Tensor,
    z: Tensor,
    weights: PromptWeights,
    before: Tensor | None,
    first: Tensor | None,
    lengths: Tensor | None,
    last: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """`mamba_mixer_of_prompt` with y of one token a row, (b, d).

    Args:
        x: (b, l, d), contiguous, or with any stride of tokens.
        z: (b, d), contiguous, of the tokens `last`.
        last: (b,) int64: where among b l tokens each row's last real one is.
    """
    x, dt, B, C, conv_memory = _projected(x, weights, before, lengths)
    state = scan.final_state(x, dt, weights.A, B, weights.dt_bias, first, True)
    y = last_output(state, C.flatten(0, 1), x, z, weights.D, last)
    return y, conv_memory, state


def _projected(
    x: Tensor, weights: PromptWeights, before: Tensor | None, lengths: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x behind the convolution, dt, B, C, and the convolution's new memory."""
    w = weights
    of_kernel = w.conv_weight, w.conv_bias, w.x_proj, w.dt_proj
    if hopper.fits(x, *of_kernel) and hopper.is_enough(x):
        x, columns, dt, last = hopper.projected(
            x, *of_kernel, before=before, lengths=lengths, last=True
        )
    else:
        x, last = conv.forward_of_prompt(x, w.conv_weight, w.conv_bias, before, lengths)
        columns, dt = _products(x, w.x_proj, w.dt_proj)
        if lengths is not None:
            fill_pads_(dt, lengths)
    _, B, C = _parts(columns, w.dt_proj.shape[1], w.A.shape[1])
    return x, dt, B, C, last


# ---- what autograd, torch.compile and fake tensors need to know ----------------------------------


@_forward.register_fake
def _(
    xz: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    x_proj: Tensor,
    dt_proj: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    seq_idx: Tensor | None,
    keep: bool,
    keep_x: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    x = xz.new_empty(*xz.shape[:2], len(A))
    y, final_state, starts = scan._outputs(x, A, keep)
    columns = _aligned(xz, *xz.shape[:2], len(x_proj))
    dt = torch.empty_like(x) if keep else xz.new_empty(0)
    if not keep:
        columns = xz.new_empty(0)
    return y, final_state, x if keep_x else xz.new_empty(0), columns, dt, starts


@_backward.register_fake
def _(grad_y: Tensor, grad_final: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    return tuple(t.new_empty(t.shape) for t in rest[:8])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, _, _ = inputs
    ctx.save_for_backward(*tensors, *output[2:])
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, grad_y: Tensor | None, grad_final: Tensor | None, *_: Any) -> Any:
    saved = ctx.saved_tensors  # once: a checkpointed layer computes them when they are asked for
    if grad_y is None:
        grad_y = torch.zeros_like(saved[11])  # dt
    return *_backward(grad_y, grad_final, *saved), None, None, None


_forward.register_autograd(_gradients, setup_context=_save)
