"""Triton kernels of `rms_norm` and `add_rms_norm`.

Letters: t rows, m their width.

Both directions are bound by device memory: a row is read once, kept in registers as float32 and
written once. Forward with an addition, float32 stream and bfloat16 layers: 12 bytes a number;
backward: 16.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from blackmamba.ops.gpu.kernels import column_sums

_TILE = 2048  # numbers that a program has in registers at least: narrow rows come several at once
_STAGES = 3  # rows that are on their way while one is worked on
_PROGRAMS = 512  # of the backward pass at least; each leaves a row of the weight's gradient


@triton.jit
def _rms_norm_forward_kernel(
    x_ptr, update_ptr, weight_ptr, sum_ptr, y_ptr, t, m, eps,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, HAS_UPDATE: tl.constexpr,
):  # fmt: skip
    # Owns ROWS rows. On chip: the rows, in float32, from reading to writing.
    # Bytes: x and update once, the sum and y once. Bound: device memory.
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    at = rows[:, None] * m + columns[None, :]
    mask = (rows[:, None] < t) & (columns[None, :] < m)
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if HAS_UPDATE:
        x += tl.load(update_ptr + at, mask=mask, other=0.0).to(tl.float32)
        narrow = x.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + at, narrow, mask=mask)
        x = narrow.to(tl.float32)  # the norm is of what is stored
    scale = 1 / tl.sqrt(tl.sum(x * x, axis=1) / m + eps)
    weight = tl.load(weight_ptr + columns, mask=columns < m, other=0.0).to(tl.float32)
    y = x * scale[:, None] * weight[None, :]
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _rms_norm_backward_kernel(
    grad_y_ptr, grad_sum_ptr, x_ptr, weight_ptr, grad_x_ptr, grad_update_ptr, partial_ptr,
    t, m, eps, ROWS: tl.constexpr, TURNS: tl.constexpr, BLOCK: tl.constexpr,
    HAS_SUM: tl.constexpr, HAS_UPDATE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    # Owns TURNS times ROWS rows. On chip: ROWS of them, and the sum over all of its rows of the
    # weight's gradient, written once at the end, so that no order is left to chance.
    # Bytes: grad_y, grad_sum and x once, grad_x and grad_update once. Bound: device memory.
    columns = tl.arange(0, BLOCK)
    in_row = columns < m
    weight = tl.load(weight_ptr + columns, mask=in_row, other=0.0).to(tl.float32)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for turn in tl.range(TURNS, num_stages=STAGES):
        group = tl.program_id(0).to(tl.int64) * TURNS + turn
        rows = group * ROWS + tl.arange(0, ROWS)
        at = rows[:, None] * m + columns[None, :]
        mask = (rows[:, None] < t) & in_row[None, :]
        x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(grad_y_ptr + at, mask=mask, other=0.0).to(tl.float32)
        scale = 1 / tl.sqrt(tl.sum(x * x, axis=1) / m + eps)
        x *= scale[:, None]  # of unit mean square
        total += g * x
        g *= weight[None, :]
        along = tl.sum(g * x, axis=1) / m
        g = (g - x * along[:, None]) * scale[:, None]
        if HAS_SUM:
            g += tl.load(grad_sum_ptr + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(grad_x_ptr + at, g.to(grad_x_ptr.dtype.element_ty), mask=mask)
        if HAS_UPDATE:
            tl.store(grad_update_ptr + at, g.to(grad_update_ptr.dtype.element_ty), mask=mask)
    partial = tl.sum(total, axis=0)
    tl.store(partial_ptr + tl.program_id(0).to(tl.int64) * m + columns, partial, mask=in_row)


def forward(
    x: Tensor, update: Tensor | None, weight: Tensor, eps: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """x + update (x itself without one) and its norm; all are contiguous."""
    m = x.shape[-1]
    t = x.numel() // max(1, m)
    total = x if update is None else torch.empty_like(x)
    y = torch.empty_like(x, dtype=out_dtype)
    if x.numel():
        block, rows = _tile(m)
        _rms_norm_forward_kernel[(triton.cdiv(t, rows),)](
            x, x if update is None else update, weight, total, y, t, m, eps,
            ROWS=rows, BLOCK=block, HAS_UPDATE=update is not None, num_warps=_warps(rows * block),
        )  # fmt: skip
    return total, y


def backward(
    grad_y: Tensor,
    grad_sum: Tensor | None,
    x: Tensor,
    weight: Tensor,
    eps: float,
    update_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, of update in its dtype (x's own tensor if that is the same), of weight."""
    m = x.shape[-1]
    t = x.numel() // max(1, m)
    grad_x = torch.empty_like(x)
    has_update = update_dtype != x.dtype
    grad_update = torch.empty_like(x, dtype=update_dtype) if has_update else grad_x
    if not x.numel():
        return grad_x, grad_update, torch.zeros_like(weight)
    block, rows = _tile(m)
    turns = max(1, triton.next_power_of_2(t // (rows * _PROGRAMS) + 1) // 2)
    programs = triton.cdiv(t, rows * turns)
    partial = x.new_empty((programs, m), dtype=torch.float32)
    _rms_norm_backward_kernel[(programs,)](
        grad_y, x if grad_sum is None else grad_sum, x, weight, grad_x, grad_update, partial,
        t, m, eps, ROWS=rows, TURNS=turns, BLOCK=block,
        HAS_SUM=grad_sum is not None, HAS_UPDATE=has_update, STAGES=_STAGES,
        num_warps=_warps(rows * block),
    )  # fmt: skip
    return grad_x, grad_update, column_sums(partial, weight.dtype)


def _tile(m: int) -> tuple[int, int]:
    """Columns and rows of a program's tile."""
    block = triton.next_power_of_2(m)
    return block, max(1, _TILE // block)


def _warps(numbers: int) -> int:
    return min(16, max(1, numbers // 512))
