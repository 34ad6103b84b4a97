"""The convolution and its activation in one pass over memory; its gradient, too, saves no more
than the inputs and computes the rest again."""

from typing import Any

import torch
from torch import Tensor

from blackmamba.ops import native


def causal_conv1d_native(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    before: Tensor | None,
    seq_idx: Tensor | None,
    activation: str,
) -> Tensor:
    """`causal_conv1d` without its final state, of float32 or bfloat16, computed in float32."""
    if seq_idx is not None:
        seq_idx = seq_idx.to(torch.int64).contiguous()
    return _forward(x, weight, bias, before, seq_idx, activation == "silu")


@torch.library.custom_op("blackmamba::causal_conv1d", mutates_args=())
def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    before: Tensor | None,
    seq_idx: Tensor | None,
    silu: bool,
) -> Tensor:
    return forward(x, weight, bias, before, seq_idx, silu)


@torch.library.custom_op("blackmamba::causal_conv1d_backward", mutates_args=())
def _backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    before: Tensor | None,
    seq_idx: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias and before; empty for what is absent."""
    grad_x = x.new_empty(x.shape)
    rest = backward_into(grad_x, grad_y, x, weight, bias, before, seq_idx, silu)
    return grad_x, *rest


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    before: Tensor | None,
    seq_idx: Tensor | None,
    silu: bool,
) -> Tensor:
    """y; seq_idx is contiguous int64."""
    kept = _Kept(x, weight, bias, before, seq_idx)
    y = x.new_empty(x.shape)
    native.extension().causal_conv1d(kept.arguments(silu), y.data_ptr())
    return y


def backward_into(
    grad_x: Tensor,
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    before: Tensor | None,
    seq_idx: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Writes x's gradient into `grad_x`, whose rows need be contiguous alone; gives the others."""
    kept = _Kept(x, weight, bias, before, seq_idx)
    grad_y = _innermost(grad_y)
    grad_rows = torch.empty_like(kept.rows)
    grad_bias = grad_rows.new_empty(len(weight))
    grad_before = x.new_zeros(0 if before is None else before.shape)
    native.extension().causal_conv1d_backward(
        kept.arguments(silu),
        (grad_y.data_ptr(), grad_y.stride(0), grad_y.stride(1)),
        (grad_x.data_ptr(), grad_x.stride(0), grad_x.stride(1)),
        grad_rows.data_ptr(),
        grad_bias.data_ptr(),
        0 if before is None else grad_before.data_ptr(),
    )
    return (
        grad_rows.t().to(weight.dtype).contiguous(),
        weight.new_empty(0) if bias is None else grad_bias.to(bias.dtype),
        grad_before,
    )


class _Kept:
    """The inputs as the kernels take them, alive for as long as their addresses are in use."""

    def __init__(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        before: Tensor | None,
        seq_idx: Tensor | None,
    ):
        self.x = _innermost(x)
        self.rows = weight.float().t().contiguous()  # (k, d)
        self.bias = None if bias is None else bias.float().contiguous()
        self.before = None if before is None else before.contiguous()
        self.seq_idx = seq_idx

    def arguments(self, silu: bool) -> object:
        """The kernels' own struct."""
        k, d = self.rows.shape
        return native.extension().causal_conv1d_inputs(
            self.x.data_ptr(),
            self.x.stride(0),
            self.x.stride(1),
            self.rows.data_ptr(),
            _address(self.bias),
            _address(self.before),
            _address(self.seq_idx),
            self.x.shape[0],
            self.x.shape[1],
            d,
            k,
            silu,
            self.x.dtype == torch.bfloat16,
            torch.get_num_threads(),
        )


def _innermost(x: Tensor) -> Tensor:
    return x if x.stride(2) == 1 or x.shape[2] < 2 else x.contiguous()


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


@_forward.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    before: Tensor | None,
    seq_idx: Tensor | None,
    silu: bool,
) -> Tensor:
    return x.new_empty(x.shape)


@_backward.register_fake
def _(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    before: Tensor | None,
    seq_idx: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape),
        weight.new_empty(weight.shape),
        weight.new_empty(0) if bias is None else bias.new_empty(bias.shape),
        x.new_empty(0 if before is None else before.shape),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.silu = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # once: a checkpointed layer computes them when they are asked for
    _, _, bias, before, _ = saved
    x, weight, *rest = _backward(grad_y, *saved, ctx.silu)
    return (
        x,
        weight,
        None if bias is None else rest[0],
        None if before is None else rest[1],
        None,
        None,
    )


_forward.register_autograd(_gradients, setup_context=_save)
