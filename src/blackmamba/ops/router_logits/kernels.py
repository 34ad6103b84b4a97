"""Triton kernels of `router_logits`: few columns, so that reading x is all that takes time.

Letters: t rows, m their width, e experts.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from blackmamba.ops.gpu import interpreted
from blackmamba.ops.gpu.kernels import column_sums

_ROWS = 64
_FEW_ROWS = 16  # of a program, where so many rows would not keep a GPU busy
_FEW = 8_192
_COLUMNS = 128  # of x at a time
LOG2E = tl.constexpr(1.4426950408889634)
_BACK_ROWS, _BACK_COLUMNS, _BACK_WARPS = 16, 128, 2
_PARTS = 256  # into which the backward pass cuts the rows; each leaves a gradient of the weight
_WARPS = 4


@triton.jit
def _router_forward_kernel(
    x_ptr, weight_ptr, bias_ptr, y_ptr, ids_ptr, gate_ptr, t, m, e,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, E: tl.constexpr,
    SPLIT: tl.constexpr, OPERAND: tl.constexpr, CHOICE: tl.constexpr,
):  # fmt: skip
    # Owns ROWS rows and all experts. On chip: their sums. Bytes: x once, the weight once for each
    # program (from the L2 cache), y once. Bound: device memory.
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    experts = tl.arange(0, E)
    total = tl.zeros((ROWS, E), tl.float32)
    for block in range(BLOCKS):
        columns = block * BLOCK + tl.arange(0, BLOCK)
        inside = columns < m
        x = tl.load(
            x_ptr + rows[:, None] * m + columns[None, :],
            mask=(rows[:, None] < t) & inside[None, :], other=0.0,
        )  # fmt: skip
        w = tl.load(
            weight_ptr + experts[None, :] * m + columns[:, None],
            mask=(experts[None, :] < e) & inside[:, None], other=0.0,
        )  # fmt: skip
        if SPLIT:  # a float32 is the sum of three bfloat16, whose products with x are exact
            first = w.to(tl.bfloat16)
            w -= first.to(tl.float32)
            second = w.to(tl.bfloat16)
            third = (w - second.to(tl.float32)).to(tl.bfloat16)
            total = tl.dot(x.to(OPERAND), first.to(OPERAND), total)
            total = tl.dot(x.to(OPERAND), second.to(OPERAND), total)
            total = tl.dot(x.to(OPERAND), third.to(OPERAND), total)
        else:
            total = tl.dot(x.to(tl.float32), w.to(tl.float32), total, input_precision="ieee")
    total += tl.load(bias_ptr + experts, mask=experts < e, other=0.0).to(tl.float32)[None, :]
    at = rows[:, None] * e + experts[None, :]
    mask = (rows[:, None] < t) & (experts[None, :] < e)
    tl.store(y_ptr + at, total.to(y_ptr.dtype.element_ty), mask=mask)
    if CHOICE:
        total = tl.where((experts < e)[None, :], total, -float("inf"))
        best, chosen = tl.max(total, 1, return_indices=True, return_indices_tie_break_left=True)
        chosen = tl.minimum(chosen, e - 1)  # of NaN, too, an expert that there is
        tl.store(ids_ptr + rows, chosen.to(tl.int64), mask=rows < t)
        tl.store(gate_ptr + rows, 1 / (1 + tl.exp2(-LOG2E * best)), mask=rows < t)


@triton.jit
def _router_backward_kernel(
    grad_ptr, x_ptr, weight_ptr, grad_x_ptr, partial_ptr, t, m, e,
    ROWS: tl.constexpr, TURNS: tl.constexpr, BLOCK: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    # Owns TURNS times ROWS rows and BLOCK columns. On chip: the weight of those columns, and the
    # sum over its rows of that weight's gradient, written once. Bytes: x and grad_x once, grad once
    # for each block of columns. Bound: device memory.
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    experts = tl.arange(0, E)
    inside = columns < m
    of_weight = (experts[:, None] < e) & inside[None, :]
    at_weight = experts[:, None] * m + columns[None, :]
    w = tl.load(weight_ptr + at_weight, mask=of_weight, other=0.0).to(tl.float32)
    total = tl.zeros((E, BLOCK), tl.float32)
    for turn in range(TURNS):
        group = tl.program_id(0).to(tl.int64) * TURNS + turn
        rows = group * ROWS + tl.arange(0, ROWS)
        in_rows = rows[:, None] < t
        g = tl.load(
            grad_ptr + rows[:, None] * e + experts[None, :],
            mask=in_rows & (experts[None, :] < e), other=0.0,
        ).to(tl.float32)  # fmt: skip
        at = rows[:, None] * m + columns[None, :]
        mask = in_rows & inside[None, :]
        x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
        grad_x = tl.dot(g, w, input_precision="ieee")
        tl.store(grad_x_ptr + at, grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask)
        total += tl.dot(tl.trans(g), x, input_precision="ieee")
    at_partial = tl.program_id(0).to(tl.int64) * e * m + at_weight
    tl.store(partial_ptr + at_partial, total, mask=of_weight)


def forward(
    x: Tensor, weight: Tensor, bias: Tensor, choice: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Contiguous tensors to (t, e) in weight's dtype; with `choice` also where each row is largest,
    (t,) int64, and the sigmoid of that, (t,)."""
    (t, m), e = x.shape, len(weight)
    y = x.new_empty((t, e), dtype=weight.dtype)
    chosen = t if choice else 0
    ids, gate = x.new_empty(chosen, dtype=torch.int64), y.new_empty(chosen)
    if y.numel():
        rows = _ROWS if t >= _FEW else _FEW_ROWS
        _router_forward_kernel[(triton.cdiv(t, rows),)](
            x, weight, bias, y, ids, gate, t, m, e,
            ROWS=rows, BLOCK=_COLUMNS, BLOCKS=triton.cdiv(m, _COLUMNS), E=_padded(e),
            SPLIT=x.dtype == torch.bfloat16 and weight.dtype == torch.float32,
            OPERAND=tl.float32 if interpreted() else tl.bfloat16,  # numpy has no bfloat16
            CHOICE=choice, num_warps=_WARPS,
        )  # fmt: skip
    return y, ids, gate


def backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and of weight."""
    (t, m), e = x.shape, len(weight)
    grad_x = torch.empty_like(x)
    if not (t and e and m):
        return grad_x.zero_(), torch.zeros_like(weight)
    turns = max(1, triton.next_power_of_2(t // (_BACK_ROWS * _PARTS) + 1) // 2)
    parts = triton.cdiv(t, _BACK_ROWS * turns)
    partial = x.new_empty((parts, e, m), dtype=torch.float32)
    _router_backward_kernel[(parts, triton.cdiv(m, _BACK_COLUMNS))](
        grad, x, weight, grad_x, partial, t, m, e,
        ROWS=_BACK_ROWS, TURNS=turns, BLOCK=_BACK_COLUMNS, E=_padded(e), num_warps=_BACK_WARPS,
    )  # fmt: skip
    return grad_x, column_sums(partial, weight.dtype)


def _padded(e: int) -> int:
    """A product has at least 16 columns."""
    return max(16, triton.next_power_of_2(e))
