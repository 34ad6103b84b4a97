"""`router_logits` in C++: x is neither copied nor kept in float32; one call each way."""

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from blackmamba.ops import native
from blackmamba.ops.checks import readable
from blackmamba.ops.router_logits.reference import router_logits_reference


def router_logits_native(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`router_logits` of a float32 weight, with sums in float32."""
    one_dtype = weight.dtype == bias.dtype == torch.float32
    if not (readable(x) and one_dtype):
        return router_logits_reference(x, weight, bias)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, weight, bias)):
        return cast(Tensor, _Logits.apply(x, weight, bias))
    return _run(x, weight, bias)


class _Logits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _run(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        rows, weight, grad_logits = native.rows(x), weight.contiguous(), grads[0].contiguous()
        grad_x, grad_weight = rows.new_empty(rows.shape), weight.new_empty(weight.shape)
        grad_bias = weight.new_empty(len(weight))
        native.extension().router_logits_backward(
            *_arguments(rows, weight),
            *(t.data_ptr() for t in (grad_logits, grad_x, grad_weight, grad_bias)),
        )
        return grad_x, grad_weight, grad_bias


def _run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    rows, weight, bias = native.rows(x), weight.contiguous(), bias.contiguous()
    logits = weight.new_empty(len(rows), len(weight))
    native.extension().router_logits(*_arguments(rows, weight), bias.data_ptr(), logits.data_ptr())
    return logits


def _arguments(rows: Tensor, weight: Tensor) -> tuple[Any, ...]:
    return (
        rows.data_ptr(),
        rows.stride(0),
        rows.dtype == torch.bfloat16,
        weight.data_ptr(),
        (*rows.shape, len(weight)),
        torch.get_num_threads(),
    )
