"""`rotary` by Triton, in one pass over memory each way; it saves the tables alone."""

from typing import Any

import torch
from torch import Tensor

from blackmamba.ops import gpu

_NUMBERS = 2048  # pairs of a program


def rotary_triton(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`rotary`, its tables in float32."""
    return _turned(x, cos.float(), sin.float(), False)


@torch.library.custom_op("blackmamba::rotary_triton", mutates_args=())
def _turned(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    """x turned, or turned back."""
    from blackmamba.ops.rotary import kernels

    x, cos, sin = x.contiguous(), cos.contiguous(), sin.contiguous()
    y = torch.empty_like(x)
    n, half = x.shape[2], cos.shape[-1]
    if x.numel():
        padded = 1 << (half - 1).bit_length()
        heads, rows = x.numel() // (2 * half), max(1, _NUMBERS // padded)
        gpu.launch(
            kernels.rotary_kernel, (-(-heads // rows),),
            x, cos, sin, y, heads, n, cos.shape[0] * cos.shape[1], half,
            BACK=back, ROWS=rows, HALF=padded,
        )  # fmt: skip
    return y


@_turned.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    return x.new_empty(x.shape)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, bool], output: Tensor) -> None:
    _, cos, sin, ctx.back = inputs
    ctx.save_for_backward(cos, sin)


def _gradient(ctx: Any, grad_y: Tensor) -> tuple[Tensor, None, None, None]:
    cos, sin = ctx.saved_tensors
    return _turned(grad_y, cos, sin, not ctx.back), None, None, None


_turned.register_autograd(_gradient, setup_context=_save)
