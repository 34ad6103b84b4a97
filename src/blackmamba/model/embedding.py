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

    def with_table(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """What `forward` gives, and the table (v, m) for a head that multiplies with it.

        The gradient of the table is then that of the head with the few rows of the tokens added.
        Two separate uses of the weight would give two gradients as large as the table, the tokens'
        one almost all zeros: on a CPU, writing and adding these took 37 ms of a step of 128 tokens
        of a 130M model.
        """
        weight = self.weight
        is_apart = weight.device.type != "cpu" or weight.dtype.itemsize > 4
        has_gradient = weight.requires_grad and torch.is_grad_enabled()
        if is_apart or not has_gradient or torch.compiler.is_compiling():
            return self(ids), weight
        return cast(tuple[Tensor, Tensor], _LookupWithTable.apply(weight, weight, ids))


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
        return _summed(grads[0], ids.flatten(), ctx.shape[0]).to(ctx.dtype), None


class _LookupWithTable(torch.autograd.Function):
    """The same weight twice, so that autograd adds up the two gradients: it knows whether it may
    write into the head's."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, table: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(ids)
        ctx.shape, ctx.dtype = weight.shape, weight.dtype
        ctx.set_materialize_grads(False)
        return nn.functional.embedding(ids, weight), table.view_as(table)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (ids,), (of_rows, of_table) = ctx.saved_tensors, grads
        if of_rows is None:
            return None, of_table, None
        if of_table is None:  # nothing to add to: gradients that stay are never sparse
            return _summed(of_rows, ids.flatten(), ctx.shape[0]).to(ctx.dtype), None, None
        places, numbers = ids.unique(return_inverse=True)
        total = _summed(of_rows, numbers.flatten(), len(places)).to(ctx.dtype)
        with torch.sparse.check_sparse_tensor_invariants(False):  # the argument warns in torch 2.11
            rows = torch.sparse_coo_tensor(places[None], total, ctx.shape, is_coalesced=True)
        return rows, of_table, None


def _summed(rows: Tensor, places: Tensor, n: int) -> Tensor:
    """(n, m) float32: the sum of the rows of each place."""
    total = rows.new_zeros(n, rows.shape[-1], dtype=torch.float32)
    return total.index_add_(0, places, rows.flatten(0, -2).float())
