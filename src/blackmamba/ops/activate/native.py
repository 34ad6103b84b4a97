"""`activate` in one pass over memory, and its gradient in one more; saves only h."""

from typing import Any

import torch
from torch import Tensor

from blackmamba.ops import native


def activate_native(h: Tensor, activation: str, gated: bool) -> Tensor:
    """`activate` of float32 or bfloat16, computed in float32."""
    return _forward(h, activation == "gelu", gated)


def activate_rows(h: Tensor, gelu: bool, gated: bool) -> Tensor:
    """The activation; not differentiable."""
    rows = native.rows(h)
    y = h.new_empty(_out_shape(h, gated))
    native.extension().activate(*_arguments(rows, gelu, gated), y.data_ptr())
    return y


def activate_rows_backward(
    grad_y: Tensor,
    h: Tensor,
    gelu: bool,
    gated: bool,
    scale: Tensor | None = None,
    dots: Tensor | None = None,
    places: Tensor | None = None,
) -> Tensor:
    """The gradient of h; not differentiable.

    Args:
        scale: a float32 for each row, multiplies its grad_y.
        dots: a float32 for each row; written: the product of its output and unscaled grad_y.
        places: int64, contiguous: where row i's scale and dot are; None: at i.
    """
    rows, grad_rows = native.rows(h), native.rows(grad_y)
    grad_h = h.new_empty(h.shape)
    native.extension().activate_backward(
        *_arguments(rows, gelu, gated),
        grad_rows.data_ptr(),
        grad_rows.stride(0),
        grad_h.data_ptr(),
        0 if scale is None else scale.data_ptr(),
        0 if dots is None else dots.data_ptr(),
        0 if places is None else places.data_ptr(),
    )
    return grad_h


@torch.library.custom_op("blackmamba::activate", mutates_args=())
def _forward(h: Tensor, gelu: bool, gated: bool) -> Tensor:
    return activate_rows(h, gelu, gated)


@torch.library.custom_op("blackmamba::activate_backward", mutates_args=())
def _backward(grad_y: Tensor, h: Tensor, gelu: bool, gated: bool) -> Tensor:
    return activate_rows_backward(grad_y, h, gelu, gated)


def _arguments(rows: Tensor, gelu: bool, gated: bool) -> tuple[int | bool, ...]:
    t, f = rows.shape
    return (
        rows.data_ptr(),
        rows.stride(0),
        t,
        f // 2 if gated else f,
        gelu,
        gated,
        rows.dtype == torch.bfloat16,
        torch.get_num_threads(),
    )


def _out_shape(h: Tensor, gated: bool) -> tuple[int, ...]:
    return (*h.shape[:-1], h.shape[-1] // 2) if gated else tuple(h.shape)


@_forward.register_fake
def _(h: Tensor, gelu: bool, gated: bool) -> Tensor:
    return h.new_empty(_out_shape(h, gated))


@_backward.register_fake
def _(grad_y: Tensor, h: Tensor, gelu: bool, gated: bool) -> Tensor:
    return h.new_empty(h.shape)


def _save(ctx: Any, inputs: tuple[Tensor, bool, bool], output: Tensor) -> None:
    h, ctx.gelu, ctx.gated = inputs
    ctx.save_for_backward(h)


def _gradient(ctx: Any, grad_y: Tensor) -> tuple[Tensor, None, None]:
    return _backward(grad_y, *ctx.saved_tensors, ctx.gelu, ctx.gated), None, None


_forward.register_autograd(_gradient, setup_context=_save)
