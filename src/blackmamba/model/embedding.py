"""The embedding's table, whose gradient is summed in float32."""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class Embedding(nn.Embedding):
    """nn.Embedding with an exact gradient for tables of 16 bits.

    A frequent token has hundreds of rows in a batch. On a GPU torch adds them up in float32, on a
    CPU in the table's dtype, where most of the later ones would be lost.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Ids of any shape (...) to (..., m)."""
        weight = self.weight
        is_narrow = weight.device.type == "cpu" and weight.dtype.itemsize < 4
        if not (is_narrow and weight.requires_grad and torch.is_grad_enabled()):
            return super().forward(input)
        return cast(Tensor, _Lookup.apply(weight, input))


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.shape, ctx.dtype = weight.shape, weight.dtype
        return nn.functional.embedding(ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (ids,) = ctx.saved_tensors
        total = grads[0].new_zeros(ctx.shape, dtype=torch.float32)
        total.index_add_(0, ids.flatten(), grads[0].reshape(-1, ctx.shape[1]).float())
        return total.to(ctx.dtype), None
