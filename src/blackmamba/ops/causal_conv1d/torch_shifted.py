"""The convolution as k shifted multiply-adds, channels innermost; saves only its input."""

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from blackmamba.ops.checks import wide_dtype


def causal_conv1d_shifted(
    x: Tensor, weight: Tensor, bias: Tensor | None, before: Tensor, activation: str
) -> Tensor:
    """`causal_conv1d` without its final state; computed in float32, or float64 for float64."""
    return cast(Tensor, _Conv.apply(x, weight, bias, before, activation))


def _linear_part(
    x: Tensor, weight: Tensor, bias: Tensor | None, before: Tensor
) -> tuple[Tensor, Tensor]:
    """(b, l, d) before the activation, and all inputs (b, k - 1 + l, d), in the wide dtype."""
    wide = wide_dtype(x)
    l, k = x.shape[1], weight.shape[1]
    seen = torch.cat((before.transpose(1, 2), x), dim=1).to(wide)
    rows = weight.to(wide).t().contiguous()
    y = seen[:, k - 1 :] * rows[k - 1]
    for j in range(k - 1):
        y.addcmul_(seen[:, j : j + l], rows[j])
    if bias is not None:
        y += bias.to(wide)
    return y, seen


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, before: Tensor, activation: str
    ) -> Tensor:
        ctx.save_for_backward(x, weight, bias, before)
        ctx.activation = activation
        y, _ = _linear_part(x, weight, bias, before)
        return (F.silu(y) if activation == "silu" else y).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, bias, before = ctx.saved_tensors
        l, k = x.shape[1], weight.shape[1]
        g, seen = _linear_part(x, weight, bias, before)
        if ctx.activation == "silu":
            g = torch.ops.aten.silu_backward(grads[0].to(g.dtype), g)
        else:
            g = grads[0].to(g.dtype)
        rows = weight.to(g.dtype).t().contiguous()
        grad_seen, grad_rows = torch.zeros_like(seen), torch.empty_like(rows)
        product = torch.empty_like(g)
        for j in range(k):
            grad_seen[:, j : j + l].addcmul_(g, rows[j])
            grad_rows[j] = torch.mul(g, seen[:, j : j + l], out=product).sum((0, 1))
        return (
            grad_seen[:, k - 1 :].to(x.dtype),
            grad_rows.t().to(weight.dtype),
            None if bias is None else g.sum((0, 1)).to(bias.dtype),
            grad_seen[:, : k - 1].transpose(1, 2).to(before.dtype),
            None,
        )
