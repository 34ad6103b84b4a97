"""`rms_norm` and `add_rms_norm` by Triton; they save x, or the sum, alone."""

from typing import Any

import torch
from torch import Tensor


def rms_norm_triton(x: Tensor, weight: Tensor, eps: float, out_dtype: torch.dtype) -> Tensor:
    """`rms_norm` in one pass over memory."""
    return _forward(x, None, weight, eps, out_dtype)[1]


def add_rms_norm_triton(
    x: Tensor, update: Tensor, weight: Tensor, eps: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`add_rms_norm` in one pass over memory."""
    return _forward(x, update, weight, eps, out_dtype)


@torch.library.custom_op("blackmamba::add_rms_norm_triton", mutates_args=())
def _forward(
    x: Tensor, update: Tensor | None, weight: Tensor, eps: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The sum, empty without an update, and its norm."""
    from blackmamba.ops.rms_norm import kernels

    update = None if update is None else update.contiguous()
    total, y = kernels.forward(x.contiguous(), update, weight.contiguous(), eps, out_dtype)
    return x.new_empty(0) if update is None else total, y


@torch.library.custom_op("blackmamba::add_rms_norm_triton_backward", mutates_args=())
def _backward(
    grad_y: Tensor,
    grad_sum: Tensor | None,
    x: Tensor,
    weight: Tensor,
    eps: float,
    update_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, of update (empty if it is the same as x's) and of weight."""
    from blackmamba.ops.rms_norm import kernels

    grad_sum = None if grad_sum is None else grad_sum.contiguous()
    grad_x, grad_update, grad_weight = kernels.backward(
        grad_y.contiguous(), grad_sum, x.contiguous(), weight.contiguous(), eps, update_dtype
    )
    return grad_x, x.new_empty(0) if grad_update is grad_x else grad_update, grad_weight


@_forward.register_fake
def _(
    x: Tensor, update: Tensor | None, weight: Tensor, eps: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    return x.new_empty(0 if update is None else x.shape), x.new_empty(x.shape, dtype=out_dtype)


@_backward.register_fake
def _(
    grad_y: Tensor,
    grad_sum: Tensor | None,
    x: Tensor,
    weight: Tensor,
    eps: float,
    update_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    same = update_dtype == x.dtype
    return (
        x.new_empty(x.shape),
        x.new_empty(0) if same else x.new_empty(x.shape, dtype=update_dtype),
        weight.new_empty(weight.shape),
    )


def _save(
    ctx: Any,
    inputs: tuple[Tensor, Tensor | None, Tensor, float, torch.dtype],
    output: tuple[Tensor, Tensor],
) -> None:
    x, update, weight, ctx.eps, _ = inputs
    ctx.update_dtype = None if update is None else update.dtype
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x if update is None else output[0], weight)


def _gradients(
    ctx: Any, grad_sum: Tensor | None, grad_y: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
    x, weight = ctx.saved_tensors
    dtype = ctx.update_dtype
    if dtype is None:
        grad_sum, dtype = None, x.dtype
    if grad_y is None:
        grad_x, grad_weight = grad_sum, None
        grad_update = None if grad_sum is None else grad_sum.to(dtype)
    else:
        grad_x, grad_update, grad_weight = _backward(grad_y, grad_sum, x, weight, ctx.eps, dtype)
        grad_update = grad_x if dtype == x.dtype else grad_update
    return grad_x, None if ctx.update_dtype is None else grad_update, grad_weight, None, None


_forward.register_autograd(_gradients, setup_context=_save)
