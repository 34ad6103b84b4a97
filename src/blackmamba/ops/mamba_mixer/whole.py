"""The layer's inner part of float32 in one call each way, see bind.cpp.

The same kernels in the same order as native.py calls them, so the same bits. It pays where a call
from Python costs as much as a small product: a step of few tokens.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from blackmamba.ops import native
from blackmamba.ops.linear import is_by_native


def fits(xz: Tensor, weights: tuple[Tensor, ...]) -> bool:
    """Whether every product is one for our kernel, and all is float32 as the kernels read it."""
    conv_weight, _, x_proj, dt_proj, _, A, _ = weights
    return (
        all(t.dtype == torch.float32 for t in (xz, *weights))
        and all(t.is_contiguous() for t in weights)
        and conv_weight.shape[1] > 0
        and xz.stride(2) == 1
        and is_by_native(xz.shape[0] * xz.shape[1], x_proj)
        and is_by_native(xz.shape[0] * xz.shape[1], dt_proj)
        and A.shape[1] > 0
    )


class WholeMixer(torch.autograd.Function):
    """`mamba_mixer` of what `fits`, with everything kept."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        xz, *weights, seq_idx = inputs
        sizes = _sizes(xz, weights)
        b, l, d, n, _, _ = sizes
        extension = native.extension()
        kept = xz.new_empty(extension.mamba_mixer_kept(sizes))
        y, final_state = xz.new_empty(b, l, d), xz.new_empty(b, d, n)
        extension.mamba_mixer(
            sizes,
            _view(xz),
            tuple(w.data_ptr() for w in weights),
            0 if seq_idx is None else seq_idx.data_ptr(),
            kept.data_ptr(),
            y.data_ptr(),
            final_state.data_ptr(),
            torch.get_num_threads(),
        )
        ctx.save_for_backward(*inputs, kept)
        return y, final_state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad_y, grad_final = grads
        xz, *weights, seq_idx, kept = ctx.saved_tensors
        sizes = _sizes(xz, weights)
        extension = native.extension()
        grad_y = grad_y if grad_y.stride(2) == 1 else grad_y.contiguous()
        grad_final = grad_final.contiguous()
        # rows apart: a multiple of 4 KiB from each other they would share few lines of the cache
        b, l, _ = xz.shape
        g_xz = xz.new_empty(b, l, xz.shape[2] + 16)[..., : xz.shape[2]]
        found = [w.new_empty(w.shape) for w in weights]
        buffer = xz.new_empty(extension.mamba_mixer_buffer(sizes))
        extension.mamba_mixer_backward(
            sizes,
            _view(xz),
            tuple(w.data_ptr() for w in weights),
            0 if seq_idx is None else seq_idx.data_ptr(),
            kept.data_ptr(),
            _view(grad_y),
            grad_final.data_ptr(),
            _view(g_xz),
            tuple(g.data_ptr() for g in found),
            buffer.data_ptr(),
            torch.get_num_threads(),
        )
        return g_xz, *found, None


def _sizes(xz: Tensor, weights: list[Tensor]) -> tuple[int, int, int, int, int, int]:
    """b, l, d, n, r and k."""
    (d, k), r, n = weights[0].shape, weights[3].shape[1], weights[5].shape[1]
    return xz.shape[0], xz.shape[1], d, n, r, k


def _view(tensor: Tensor) -> tuple[int, int, int]:
    return tensor.data_ptr(), tensor.stride(0), tensor.stride(1)
