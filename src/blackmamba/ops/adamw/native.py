"""`adamw_` and `global_norm` in C++, of all tensors in one call and one pass over memory."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from blackmamba.ops import native
from blackmamba.ops.adamw.tensors import AdamWTensors


@torch.no_grad()
def adamw_native(
    tensors: Sequence[AdamWTensors], factors: Tensor, beta1: float, beta2: float, eps: float
) -> None:
    """The same bits on any number of threads."""
    lr, c1, c2, scale, go, seed = factors.tolist()
    if not go:
        return
    native.extension().adamw(
        [
            (
                t.parameter.data_ptr(),
                t.gradient.data_ptr(),
                t.exp_avg.data_ptr(),
                t.exp_avg_sq.data_ptr(),
                0 if t.master is None else t.master.data_ptr(),
                t.parameter.numel(),
                number,
                t.parameter.dtype == torch.bfloat16,
                t.gradient.dtype == torch.bfloat16,
                t.decay,
            )
            for number, t in enumerate(tensors)
        ],
        (lr, c1, c2, scale, int(seed)),
        beta1,
        beta2,
        eps,
        torch.get_num_threads(),
    )


@torch.no_grad()
def global_norm_native(tensors: Sequence[Tensor]) -> Tensor:
    """The same bits on any number of threads; float32."""
    whole = [t.contiguous() for t in tensors]
    squares = native.extension().sum_of_squares(
        [(t.data_ptr(), t.numel(), t.dtype == torch.bfloat16) for t in whole],
        torch.get_num_threads(),
    )
    return torch.tensor(math.sqrt(squares), dtype=torch.float32)
