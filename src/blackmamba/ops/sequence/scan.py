"""The selective scan over rows cut into pieces: exact, all ranks at work at once.

Over a piece each number of the state decays by P = exp(A * sum of delta), and by 0 if a document
begins inside; so the piece ends with

    end = P * start + own end

where `own end` is what it would end with had it started from zero. All ranks compute theirs at the
same time, gather them with the sums of delta, and each follows the chain up to its own start; then
the scan proper runs. The backward pass is the mirror image, with the same P:

    gradient of start = P * gradient of end + own gradient

What that costs beyond the scan itself, for a token and layer: 8 d n FLOPs forward and 8 d n
backward (the two passes that find the own ends), and on the wire b d (n + 1) numbers forward and
b d n backward for each rank, whatever the length.

Letters: b batch, l tokens of a piece, d d_inner, n d_state, p pieces.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from blackmamba.ops.backend import Backend
from blackmamba.ops.checks import wide_dtype
from blackmamba.ops.selective_scan import selective_scan
from blackmamba.ops.sequence.pieces import Pieces, gathered

_BLOCK_TOKENS = 8192
"""So many at a time are read in float32 backward: what that takes does not grow with the row."""
_LEAST_DELTA = 1e-20
"""exp(A delta) is 1 for it, and numbers can be divided by it."""


def selective_scan_of_pieces(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    pieces: Pieces,
    *,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    seq_idx: Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """`selective_scan` of whole rows; every rank calls it with its own piece.

    Every rank must also run the backward pass, in which they exchange gradients.

    Args:
        x: (b, l, d), this rank's piece; l may differ between ranks, and is at least 1.
        dt, A, B, C, D, z, dt_bias, dt_softplus, backend: see `selective_scan`.
        pieces: how the rows are cut.
        seq_idx: (b, l), as `pieces` was made of.
    Returns:
        y: (b, l, d), in x's dtype.
        final_state: (b, d, n), of this rank's last token.
    Raises:
        InputError, BackendError: see `selective_scan`.
    """
    options: dict[str, Any] = {"seq_idx": seq_idx, "backend": backend}
    delta: dict[str, Any] = {"dt_bias": dt_bias, "dt_softplus": dt_softplus}
    with torch.no_grad():
        _, own_end = selective_scan(x, dt, A, B, B, **delta, **options)
        total = _delta(dt, dt_bias, dt_softplus, own_end.dtype).sum(1)
        if seq_idx is not None:
            begins = (seq_idx[:, 1:] != seq_idx[:, :-1]).any(1)
            total = total.masked_fill(begins[:, None], torch.inf)
        ends = gathered(torch.cat((own_end, total[..., None]), -1), pieces.group)
        totals = ends[..., -1]
        start = torch.zeros_like(own_end)
        for i in range(pieces.rank):
            end = torch.addcmul(ends[i, ..., :-1], _decay(A, totals[i]), start)
            start = pieces.only_where_it_goes_on(end, i + 1)
    y, final = selective_scan(x, dt, A, B, C, D, z, initial_state=start, **delta, **options)
    if not (torch.is_grad_enabled() and (y.requires_grad or final.requires_grad)):
        return y, final
    constants = (dt_softplus, seq_idx, totals, pieces, backend)
    return _HandedBack.apply(y, final, dt, A, C, z, dt_bias, *constants)  # pyright: ignore[reportReturnType] # what a Function gives has no type


class _HandedBack(Function):
    """Nothing forward; backward the gradient of the final state from the pieces that follow.

    It stands behind the scan, so that its backward runs first and the scan's own has the whole
    gradient of the final state: one pass of the backward kernels, as in one process.
    """

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        final: Tensor,
        dt: Tensor,
        A: Tensor,
        C: Tensor,
        z: Tensor | None,
        dt_bias: Tensor | None,
        dt_softplus: bool,
        seq_idx: Tensor | None,
        totals: Tensor,
        pieces: Pieces,
        backend: Backend,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(dt, A, C, z, dt_bias, seq_idx, totals)
        ctx.options = dt_softplus, pieces, backend
        return y.view_as(y), final.view_as(final)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad_y, grad_final = grad_outputs
        dt, A, C, z, dt_bias, seq_idx, totals = ctx.saved_tensors
        dt_softplus, pieces, backend = ctx.options
        own = _gradient_of_start(grad_y, dt, A, C, z, dt_bias, dt_softplus, seq_idx, backend)
        own = torch.addcmul(own, _decay(A, totals[pieces.rank]), grad_final)
        owns = gathered(own, pieces.group)
        after = torch.zeros_like(own)  # gradient of the end of piece i, from those that follow
        for i in range(pieces.size - 1, pieces.rank, -1):
            start = torch.addcmul(owns[i], _decay(A, totals[i]), after)
            after = pieces.only_where_it_goes_on(start, i)
        return grad_y, grad_final + after, *(None for _ in range(10))


def _delta(dt: Tensor, dt_bias: Tensor | None, dt_softplus: bool, dtype: torch.dtype) -> Tensor:
    raw = dt.to(dtype)
    if dt_bias is not None:
        raw = raw + dt_bias.to(dtype)
    return F.softplus(raw) if dt_softplus else raw


def _decay(A: Tensor, total: Tensor) -> Tensor:
    """(b, d, n): what is left of a state after delta of the sum `total` (b, d); 0 for infinity."""
    total = total[..., None]
    return torch.exp(total * A.to(total.dtype)).masked_fill(total.isinf(), 0)


def _gradient_of_start(
    grad_y: Tensor,
    dt: Tensor,
    A: Tensor,
    C: Tensor,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    seq_idx: Tensor | None,
    backend: Backend,
) -> Tensor:
    """(b, d, n): the gradient of a piece's initial state, had its final state none.

    With g_t that of the state h_t:  g_t = exp(delta_{t+1} A) g_{t+1} + C_t gy_t. That is a
    selective scan in reversed time, with delta one place off and gy_t / delta_{t+1} as its x.
    """
    wide, l = wide_dtype(grad_y), grad_y.shape[1]
    state: Tensor | None = None
    next_delta, next_document = torch.ones_like(dt[:, :1], dtype=wide), None
    for first in range((l - 1) // _BLOCK_TOKENS * _BLOCK_TOKENS, -1, -_BLOCK_TOKENS):
        block = slice(first, first + _BLOCK_TOKENS)
        gy = grad_y[:, block].to(wide)
        if z is not None:
            gy = gy * F.silu(z[:, block].to(wide))
        delta = _delta(dt[:, block], dt_bias, dt_softplus, wide)
        shifted = torch.cat((delta[:, 1:], next_delta), 1)
        shifted = shifted.where(shifted.abs() > _LEAST_DELTA, _LEAST_DELTA)
        documents = None if seq_idx is None else seq_idx[:, block]
        if state is not None and documents is not None:
            state = state.masked_fill((documents[:, -1] != next_document)[:, None, None], 0)
        backwards = (t.flip(1) for t in (gy / shifted, shifted, C[:, block].to(wide)))
        x_, dt_, B_ = backwards
        _, state = selective_scan(
            x_,
            dt_,
            A,
            B_,
            B_,
            initial_state=state,
            seq_idx=None if documents is None else documents.flip(1),
            backend=backend,
        )
        next_delta = delta[:, :1]
        next_document = None if documents is None else documents[:, 0]
    assert state is not None  # there is a token
    return _decay(A, next_delta[:, 0]) * state
