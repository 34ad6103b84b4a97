"""The kernels of convolution and scan with the two small products between them, and their gradient.

One node of autograd's graph: the halves of xz's gradient are written where they belong, and what a
call costs is paid once.

Letters: b batch, l sequence, d d_inner, n d_state, r dt_rank, k d_conv.
"""

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from blackmamba.ops.causal_conv1d import native as conv
from blackmamba.ops.checks import readable
from blackmamba.ops.linear.products import add_product_, product
from blackmamba.ops.mamba_mixer import whole
from blackmamba.ops.mamba_mixer.reference import mamba_mixer_reference
from blackmamba.ops.selective_scan import native as scan


def mamba_mixer_native(
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
    """`mamba_mixer` of float32 or bfloat16; all but the products in float32."""
    inputs = (xz, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A, D)
    one_dtype = xz.dtype == x_proj.dtype == dt_proj.dtype and A.dtype == torch.float32
    if not (readable(xz) and one_dtype):
        return mamba_mixer_reference(*inputs, seq_idx, recompute)
    if seq_idx is not None:
        seq_idx = seq_idx.to(torch.int64).contiguous()
    if torch.is_grad_enabled() and any(t.requires_grad for t in inputs):
        if not recompute and whole.fits(xz, inputs[1:]):
            return cast(tuple[Tensor, Tensor], whole.WholeMixer.apply(*inputs, seq_idx))
        return cast(tuple[Tensor, Tensor], _Mixer.apply(*inputs, seq_idx, recompute))
    y, final_state, *_ = _run(*inputs, seq_idx, keep=False)
    return y, final_state


def _run(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y, the final state, and for the backward pass: x behind the convolution, x_proj's product,
    dt, and if `keep` states."""
    (d, r), n = dt_proj.shape, A.shape[1]
    x = conv.forward(xz[..., :d], conv_weight, conv_bias, None, seq_idx, True)
    columns = product(x.flatten(0, 1), x_proj).view(*x.shape[:2], r + 2 * n)
    dt, B, C = columns.split((r, n, n), dim=-1)
    dt = product(dt.flatten(0, 1), dt_proj).view(x.shape)
    bias, wide_D = dt_bias.float(), D.float()
    inputs = (x, dt, A, B, C, wide_D, xz[..., d:], bias, None, seq_idx)
    y, final_state, starts = scan._run(*inputs, True, keep)
    return y, final_state, x, columns, dt, starts


class _Mixer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        *tensors, recompute = inputs
        y, final_state, x, columns, dt, starts = _run(*tensors, keep=True)
        ctx.save_for_backward(*tensors, None if recompute else x, columns, dt, starts)
        return y, final_state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad_y, grad_final = grads
        *inputs, seq_idx, x, columns, dt, starts = ctx.saved_tensors
        xz, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A, D = inputs
        (d, r), n = dt_proj.shape, A.shape[1]
        before, z = xz[..., :d], xz[..., d:]
        if x is None:
            x = conv.forward(before, conv_weight, conv_bias, None, seq_idx, True)
        low, B, C = columns.split((r, n, n), dim=-1)
        g_xz = xz.new_empty(xz.shape)
        g_x, g_dt, g_A, g_B, g_C, g_D, _, g_dt_bias, _ = scan.backward_into(
            g_xz[..., d:], grad_y, grad_final, x, dt, A, B, C, D.float(), z, dt_bias.float(), None,
            seq_idx, starts, True,
        )  # fmt: skip
        x_td, g_x_td, low_tr, g_dt_td = (t.flatten(0, 1) for t in (x, g_x, low, g_dt))
        g_low = product(g_dt_td, dt_proj.t())
        g_columns = torch.cat((g_low, g_B.flatten(0, 1), g_C.flatten(0, 1)), dim=1)
        g_dt_proj = product(g_dt_td.t(), low_tr.t())
        g_x_proj = product(g_columns.t(), x_td.t())
        add_product_(g_x_td, g_columns, x_proj.t())
        g_conv_weight, g_conv_bias, _ = conv.backward_into(
            g_xz[..., :d], g_x, before, conv_weight, conv_bias, None, seq_idx, True
        )
        g_dt_bias, g_D = g_dt_bias.to(dt_bias.dtype), g_D.to(D.dtype)
        found = (g_xz, g_conv_weight, g_conv_bias, g_x_proj, g_dt_proj, g_dt_bias, g_A, g_D)
        return *found, None, None
