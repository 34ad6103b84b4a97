"""What the causal convolution of a piece needs of the piece before it.

Letters: b batch, l tokens of a piece, d d_inner, k d_conv.
"""

from typing import Any

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from blackmamba.errors import InputError
from blackmamba.ops.causal_conv1d import last_inputs
from blackmamba.ops.sequence.pieces import Pieces, shifted


def inputs_before(x: Tensor, memory: int, pieces: Pieces, seq_idx: Tensor | None = None) -> Tensor:
    """The `initial_state` with which `causal_conv1d` reads this rank's piece of whole rows.

    Every rank sends its last inputs to the next one and, backward, gets their gradient from it:
    b d (k - 1) numbers each way. All of the group must call this, and run its backward pass.

    Args:
        x: (b, l, d), this rank's piece; l may differ between ranks.
        memory: k - 1.
        pieces: how the rows are cut.
        seq_idx: (b, l), as `pieces` was made of.
    Returns:
        (b, d, k - 1), the last inputs of the piece before, oldest first; zeros for those that are
        not of the document with which this piece begins.
    Raises:
        InputError: the piece is shorter than k - 1: the next one would need two.
    """
    if x.shape[1] < memory:
        raise InputError(
            f"a piece of {x.shape[1]} tokens: must be at least {memory} (d_conv - 1); "
            "cut the row into fewer pieces"
        )
    return _Before.apply(last_inputs(x, None, memory, None, seq_idx), pieces)  # pyright: ignore[reportReturnType] # what a Function gives has no type


class _Before(Function):
    """The tail of the piece before, where its document goes on."""

    @staticmethod
    def forward(ctx: Any, tail: Tensor, pieces: Pieces) -> Tensor:
        ctx.pieces = pieces
        return pieces.only_where_it_goes_on(shifted(tail, pieces, 1), pieces.rank)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        pieces: Pieces = ctx.pieces
        own = pieces.only_where_it_goes_on(grad_outputs[0], pieces.rank)
        return shifted(own, pieces, -1), None
