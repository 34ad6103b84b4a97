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

_CHUNK_NUMBERS = 1 << 23  # logits held at a time: 32 MB in float32


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
        needs = any(ctx.needs_input_grad)
        grad_x = torch.empty_like(x) if needs else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if needs else None
        grad_bias = torch.zeros_like(bias, dtype=wide) if needs and bias is not None else None
        total = torch.zeros((), dtype=wide, device=x.device)
        rows = max(16, _CHUNK_NUMBERS // max(1, weight.shape[0]))
        for start in range(0, len(x), rows):
            part = slice(start, start + rows)
            logits = F.linear(x[part], weight, bias).to(wide)
            counted = labels[part] != ignore_index
            label = labels[part].where(counted, labels.new_zeros(()))[:, None]
            log_p = logits.log_softmax(dim=-1)
            total -= log_p.gather(1, label)[:, 0].where(counted, log_p.new_zeros(())).sum()
            if grad_x is None or grad_weight is None:
                continue
            g = log_p.exp_()  # d loss / d logits = softmax - one-hot
            g.scatter_add_(1, label, g.new_full((), -1.0).expand_as(label))
            g *= counted[:, None]
            narrow = g.to(x.dtype)
            grad_x[part] = narrow @ weight
            if wide == x.dtype:
                grad_weight.addmm_(narrow.t(), x[part])
            else:
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
        g = grads[0]
        scaled = [None if t is None else t * g.to(t.dtype) for t in ctx.saved_tensors]
        return scaled[0], scaled[1], None, scaled[2], None
