"""`router_logits` by Triton: x is neither copied nor kept in float32."""

from typing import Any

import torch
from torch import Tensor

from blackmamba.ops.router_logits.reference import (
    router_choice_reference,
    router_logits_reference,
)

_MOST_EXPERTS = 64  # above, it is a product like any other


def router_logits_triton(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`router_logits`, with sums in float32."""
    if len(weight) > _MOST_EXPERTS:
        return router_logits_reference(x, weight, bias)
    return _forward(x, weight, bias)


@torch.library.custom_op("blackmamba::router_logits_triton", mutates_args=())
def _forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    from blackmamba.ops.router_logits import kernels

    return kernels.forward(x.contiguous(), weight.contiguous(), bias.contiguous())[0]


def router_choice_triton(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`router_choice`, by the kernel of `router_logits`."""
    if len(weight) > _MOST_EXPERTS:
        return router_choice_reference(x, weight, bias)
    return _choose(x, weight, bias)


@torch.library.custom_op("blackmamba::router_choice_triton", mutates_args=())
def _choose(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    from blackmamba.ops.router_logits import kernels

    return kernels.forward(x.contiguous(), weight.contiguous(), bias.contiguous(), choice=True)


@_choose.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    t, e = x.shape[0], weight.shape[0]
    logits = x.new_empty((t, e), dtype=weight.dtype)
    return logits, x.new_empty(t, dtype=torch.int64), logits.new_empty(t)


@torch.library.custom_op("blackmamba::router_logits_triton_backward", mutates_args=())
def _backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    from blackmamba.ops.router_logits import kernels

    return kernels.backward(grad.contiguous(), x.contiguous(), weight.contiguous())


@_forward.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]), dtype=weight.dtype)


@_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x, weight = ctx.saved_tensors
    grad_x, grad_weight = _backward(grad, x, weight)
    return grad_x, grad_weight, grad.sum(0)


_forward.register_autograd(_gradients, setup_context=_save)
