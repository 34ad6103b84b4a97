"""`rms_norm` in one pass over memory, and its gradient in one more; saves only its inputs."""

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from blackmamba.ops import native
from blackmamba.ops.checks import readable


def rms_norm_native(x: Tensor, weight: Tensor, eps: float, out_dtype: torch.dtype) -> Tensor:
    """`rms_norm` between float32 and bfloat16, computed in float32."""
    if not readable(x):
        return _forward(x, weight, eps, out_dtype)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return cast(Tensor, _Norm.apply(x, None, weight, eps, out_dtype))
    return _run(x, None, weight, eps, out_dtype)[1]


def add_rms_norm_native(
    x: Tensor, update: Tensor, weight: Tensor, eps: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The sum, and its norm while it is in the processor's cache."""
    if not readable(x):
        total = (x + update).to(x.dtype)
        return total, _forward(total, weight, eps, out_dtype)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, update, weight)):
        return cast(tuple[Tensor, Tensor], _Norm.apply(x, update, weight, eps, out_dtype))
    return _run(x, update, weight, eps, out_dtype)


class _Norm(torch.autograd.Function):
    """Of a sum or alone; at a third of what the operation `_forward` costs for each call."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        update: Tensor | None,
        weight: Tensor,
        eps: float,
        out_dtype: torch.dtype,
    ) -> Any:
        total, y = _run(x, update, weight, eps, out_dtype)
        ctx.save_for_backward(total, weight)
        ctx.eps, ctx.update_dtype = eps, None if update is None else update.dtype
        ctx.set_materialize_grads(False)
        return y if update is None else (total, y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        total, weight = ctx.saved_tensors
        *of_total, of_y = grads
        grad_total = of_total[0] if of_total else None
        dtype, update = ctx.update_dtype, None
        if of_y is None:
            grad_x, grad_weight = grad_total, None
        else:
            if dtype == torch.bfloat16 and total.dtype != dtype:
                update = total.new_empty(total.shape, dtype=dtype)
            grad_x, grad_weight = _run_backward(of_y, total, weight, ctx.eps, grad_total, update)
        if update is None and dtype is not None and grad_x is not None:
            update = grad_x.to(dtype)
        return grad_x, update, grad_weight, None, None


def _run(
    x: Tensor, update: Tensor | None, weight: Tensor, eps: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """x + update, or x; and the norm."""
    x, wide = x.contiguous(), weight.float().contiguous()
    update = None if update is None else update.contiguous()
    total = x if update is None else x.new_empty(x.shape)
    y = x.new_empty(x.shape, dtype=out_dtype)
    native.extension().rms_norm(
        *_arguments(x, wide, eps, out_dtype),
        0 if update is None else update.data_ptr(),
        update is not None and update.dtype == torch.bfloat16,
        total.data_ptr(),
        y.data_ptr(),
    )
    return total, y


def _run_backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    eps: float,
    grad_total: Tensor | None,
    narrow: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients of x, with grad_total added, and of weight; the first, rounded to bfloat16, also
    into `narrow`, contiguous."""
    x, wide, grad_y = x.contiguous(), weight.float().contiguous(), grad_y.contiguous()
    grad_total = None if grad_total is None else grad_total.contiguous()
    grad_x, grad_weight = x.new_empty(x.shape), wide.new_empty(wide.shape)
    native.extension().rms_norm_backward(
        *_arguments(x, wide, eps, grad_y.dtype),
        grad_y.data_ptr(),
        0 if grad_total is None else grad_total.data_ptr(),
        grad_x.data_ptr(),
        grad_weight.data_ptr(),
        0 if narrow is None else narrow.data_ptr(),
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


# ---- what autograd, torch.compile and fake tensors need to know ----------------------------------


@torch.library.custom_op("blackmamba::rms_norm", mutates_args=())
def _forward(x: Tensor, weight: Tensor, eps: float, out_dtype: torch.dtype) -> Tensor:
    return _run(x, None, weight, eps, out_dtype)[1]


@torch.library.custom_op("blackmamba::rms_norm_backward", mutates_args=())
def _backward(grad_y: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return _run_backward(grad_y, x, weight, eps, None)


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
