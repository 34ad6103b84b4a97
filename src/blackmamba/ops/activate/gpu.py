"""`activate` by Triton, in one pass over memory each way; it saves h alone."""

import math
from typing import Any

import torch
from torch import Tensor

from blackmamba.ops import gpu

_NUMBERS = 1024  # of a program
_UNIT = 8  # at most that are moved as one


def activate_triton(h: Tensor, activation: str, gated: bool) -> Tensor:
    """`activate`, computed in float32."""
    return _forward(h, activation == "gelu", gated)


@torch.library.custom_op("blackmamba::activate_triton", mutates_args=())
def _forward(h: Tensor, gelu: bool, gated: bool) -> Tensor:
    from blackmamba.ops.activate import kernels

    y = h.new_empty(*h.shape[:-1], h.shape[-1] // 2 if gated else h.shape[-1])
    if y.numel():
        rows = _rows(h)
        _launch(kernels.activate_kernel, (rows, y), y.shape[-1], (rows,), gelu, gated)
    return y


@torch.library.custom_op("blackmamba::activate_triton_backward", mutates_args=())
def _backward(grad_y: Tensor, h: Tensor, gelu: bool, gated: bool) -> Tensor:
    from blackmamba.ops.activate import kernels

    grad_h = h.new_empty(h.shape)
    if grad_y.numel():
        grad, rows = _rows(grad_y), _rows(h)
        tensors, f = (grad, rows, grad_h), grad_y.shape[-1]
        _launch(kernels.activate_backward_kernel, tensors, f, (grad, rows), gelu, gated)
    return grad_h


def _rows(x: Tensor) -> Tensor:
    """(..., w) as rows whose numbers lie side by side; copied where strides forbid."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _launch(
    kernel: Any, tensors: tuple[Tensor, ...], f: int, strided: tuple[Tensor, ...],
    gelu: bool, gated: bool,
) -> None:  # fmt: skip
    """Start a kernel over f numbers of each row; `strided` are read by their rows' strides."""
    strides = [x.stride(0) for x in strided]
    unit = math.gcd(_UNIT, f, *strides)
    n, units = len(strided[0]) * f // unit, _NUMBERS // unit
    gpu.launch(
        kernel, (-(-n // units),),
        *tensors, n, f // unit, *(stride // unit for stride in strides),
        GELU=gelu, GATED=gated, UNIT=unit, UNITS=units, LONG=n > 2**31 - _NUMBERS,
    )  # fmt: skip


@_forward.register_fake
def _(h: Tensor, gelu: bool, gated: bool) -> Tensor:
    return h.new_empty(*h.shape[:-1], h.shape[-1] // 2 if gated else h.shape[-1])


@_backward.register_fake
def _(grad_y: Tensor, h: Tensor, gelu: bool, gated: bool) -> Tensor:
    return h.new_empty(h.shape)


def _save(ctx: Any, inputs: tuple[Tensor, bool, bool], output: Tensor) -> None:
    h, ctx.gelu, ctx.gated = inputs
    ctx.save_for_backward(h)


def _gradient(ctx: Any, grad_y: Tensor) -> tuple[Tensor, None, None]:
    return _backward(grad_y, *ctx.saved_tensors, ctx.gelu, ctx.gated), None, None


_forward.register_autograd(_gradient, setup_context=_save)
