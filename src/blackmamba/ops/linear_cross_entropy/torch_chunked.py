"""A few tokens' logits at a time; their gradients are taken at once: none is kept or redone.

Source: the idea of computing the gradient in the forward pass is that of Hsu et al. 2024 (Liger,
arXiv 2410.10989), section 3.2.
"""

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from blackmamba.ops.checks import wide_dtype

_CHUNK_BYTES = 1 << 25  # of the wide logits held at a time


def linear_cross_entropy_chunked(
    x: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, ignore_index: int
) -> Tensor:
    """`linear_cross_entropy` in chunks of tokens; softmax in float32, or float64 for float64."""
    return cast(Tensor, _LinearCrossEntropy.apply(x, weight, labels, bias, ignore_index))


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, ignore_index: int
    ) -> Tensor:
        wide = wide_dtype(x)
        needs_x, needs_weight, _, needs_bias, _ = ctx.needs_input_grad
        grad_x = torch.empty_like(x) if needs_x else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if needs_weight else None
        grad_bias = torch.zeros_like(bias, dtype=wide) if bias is not None and needs_bias else None
        narrow_weight = weight.to(x.dtype)
        narrow_bias = None if bias is None else bias.to(x.dtype)
        total = torch.zeros((), dtype=wide, device=x.device)
        rows = max(16, _CHUNK_BYTES // (wide.itemsize * max(1, len(weight))))
        for start in range(0, len(x), rows):
            part = slice(start, start + rows)
            log_p = F.linear(x[part], narrow_weight, narrow_bias).to(wide).log_softmax(dim=-1)
            counted = labels[part] != ignore_index
            label = labels[part].where(counted, labels.new_zeros(()))[:, None]
            total -= log_p.gather(1, label)[:, 0].where(counted, log_p.new_zeros(())).sum()
            if not any(ctx.needs_input_grad):
                continue
            g = log_p.exp_()  # the gradient of the logits: softmax - one-hot
            g.scatter_add_(1, label, g.new_full((), -1.0).expand_as(label))
            g *= counted[:, None]
            narrow = g.to(x.dtype)
            if grad_x is not None:
                torch.mm(narrow, narrow_weight, out=grad_x[part])
            if grad_weight is not None and wide == x.dtype:
                grad_weight.addmm_(narrow.t(), x[part])
            elif grad_weight is not None:
                grad_weight += narrow.t() @ x[part]
            if grad_bias is not None:
                grad_bias += g.sum(0)
        ctx.save_for_backward(
            grad_x,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None or bias is None else grad_bias.to(bias.dtype),
        )
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        scaled = [None if t is None else t * grads[0].to(t.dtype) for t in ctx.saved_tensors]
        return scaled[0], scaled[1], None, scaled[2], None
