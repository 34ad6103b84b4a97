"""Groups of rows times their expert's matrix, by torch's grouped product with Triton beside it.

The same functions as in hopper.py, for other GPUs, in bfloat16. Rows are sorted by group; `ends`
(e,) int32 are the groups' ends.

Letters: t rows, e groups, m numbers of a row, n columns of a result.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from blackmamba.ops import gpu
from blackmamba.ops.expert_mlp.order import scattered


def gated(
    x: Tensor, w: Tensor, ends: Tensor, gelu: bool, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """act(G x) (U x) of rows x (t, m), w = [G; U] (e, 2 n, m): (t, n); if `keep`, [G x | U x]."""
    from blackmamba.ops.expert_mlp import kernels

    h = grouped_product()(x, w.transpose(1, 2), offs=ends)
    t, n = len(x), w.shape[1] // 2
    y, blocks = x.new_empty(t, n), -(-n // 1024)
    gpu.launch(
        kernels.activate_kernel, (t * blocks,), h, y, t, n, GELU=gelu, BLOCK=1024, BLOCKS=blocks
    )
    return y, h if keep else None


def product(x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
    """W^T x of rows x (t, m), w (e, m, n): (t, n)."""
    return grouped_product()(x, w, offs=ends)


def placed(
    x: Tensor,
    w: Tensor,
    ends: Tensor,
    order: Tensor,
    gate: Tensor | None = None,
    *,
    by_columns: bool = False,
) -> Tensor:
    """Rows order[i] = gate[order[i]] W x_i of rows x (t, m): (t, n).

    Args:
        w: (e, n, m); `by_columns`: (e, m, n), the transposed matrices.
        order: (t,) int32, each row once.
        gate: (t,).
    """
    rows = grouped_product()(x, w if by_columns else w.transpose(1, 2), offs=ends)
    return scattered(rows, order, gate)


def gradient(x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
    """The sum of x_i w_i^T over each group's rows, x (t, m), w (t, n): (e, m, n)."""
    return grouped_product()(x.t(), w, offs=ends)


def grouped_product() -> Callable[..., Tensor]:
    """torch's."""
    return getattr(F, "grouped_mm", None) or torch._grouped_mm
