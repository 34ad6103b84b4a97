"""Triton kernel that adds up what programs of another kernel left, in a fixed order."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS, _COLUMNS = 64, 16


@triton.jit
def _column_sums_kernel(
    x_ptr, y_ptr, p, n, BLOCKS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    # Owns COLUMNS columns. On chip: ROWS sums of each. Bytes: x once. Bound: device memory, of
    # which there is little: what takes time is the way there.
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for block in range(BLOCKS):
        rows = block * ROWS + tl.arange(0, ROWS)
        mask = (rows[:, None] < p) & (columns[None, :] < n)
        at = rows[:, None].to(tl.int64) * n + columns[None, :]
        total += tl.load(x_ptr + at, mask=mask, other=0.0)
    y = tl.sum(total, axis=0)
    tl.store(y_ptr + columns, y.to(y_ptr.dtype.element_ty), mask=columns < n)


def column_sums(x: Tensor, dtype: torch.dtype) -> Tensor:
    """(p, ...) float32, contiguous, to (...) in dtype."""
    p, n = len(x), x[0].numel()
    y = x.new_empty(x.shape[1:], dtype=dtype)
    _column_sums_kernel[(triton.cdiv(n, _COLUMNS),)](
        x, y, p, n, BLOCKS=triton.cdiv(p, _ROWS), ROWS=_ROWS, COLUMNS=_COLUMNS, num_warps=4
    )
    return y
