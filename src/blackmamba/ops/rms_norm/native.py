"""`rms_norm` in one pass over memory, and its gradient in one more; saves only its inputs."""

from typing import Any

import torch
from torch import Tensor

from blackmamba.ops import native


def rms_norm_native(x: Tensor, weight: Tensor, eps: float, out_dtype: torch.dtype) -> Tensor:
    """`rms_norm` between float32 and bfloat16, computed in float32."""
    return _forward(x, weight, eps, out_dtype)


def add_rms_norm_native(
    x: Tensor, update: Tensor, weight: Tensor, eps: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The sum as torch has it, then its norm: the sum is still in the processor's cache."""
    total = (x + update).to(x.dtype)
    return total, _forward(total, weight, eps, out_dtype)


@torch.library.custom_op("blackmamba::rms_norm", mutates_args=())
def _forward(x: Tensor, weight: Tensor, eps: float, out_dtype: torch.dtype) -> Tensor:
    x, wide = x.contiguous(), weight.float().contiguous()
    y = x.new_empty(x.shape, dtype=out_dtype)
    native.extension().rms_norm(*_arguments(x, wide, eps, out_dtype), y.data_ptr())
    return y


@torch.library.custom_op("blackmamba::rms_norm_backward", mutates_args=())
def _backward(grad_y: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    x, wide, grad_y = x.contiguous(), weight.float().contiguous(), grad_y.contiguous()
    grad_x, grad_weight = x.new_empty(x.shape), wide.new_empty(wide.shape)
    native.extension().rms_norm_backward(
        *_arguments(x, wide, eps, grad_y.dtype),
        grad_y.data_ptr(),
        grad_x.data_ptr(),
        grad_weight.data_ptr(),
    )
    return grad_x, grad_weight.to(weight.dtype)


def _arguments(
    x: Tensor, weight: Tensor, eps: float, out_dtype: torch.dtype
) -> tuple[int | float | bool, ...]:
    m = x.shape[-1]
    return (
        x.data_ptr(),
        weight.data_ptr(),
        eps,
        x.numel() // max(1, m),
        m,
        x.dtype == torch.bfloat16,
        out_dtype == torch.bfloat16,
        torch.get_num_threads(),
    )


@_forward.register_fake
def _(x: Tensor, weight: Tensor, eps: float, out_dtype: torch.dtype) -> Tensor:
    return x.new_empty(x.shape, dtype=out_dtype)


@_backward.register_fake
def _(grad_y: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, float, torch.dtype], output: Tensor) -> None:
    x, weight, ctx.eps, _ = inputs
    ctx.save_for_backward(x, weight)


def _gradients(ctx: Any, grad_y: Tensor) -> tuple[Tensor, Tensor, None, None]:
    grad_x, grad_weight = _backward(grad_y, *ctx.saved_tensors, ctx.eps)
    return grad_x, grad_weight, None, None


_forward.register_autograd(_gradients, setup_context=_save)
