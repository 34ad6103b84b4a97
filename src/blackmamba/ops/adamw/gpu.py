"""`adamw_` and `global_norm` by Triton."""

from collections.abc import Sequence

import torch
from torch import Tensor

from blackmamba.ops.adamw.tensors import AdamWTensors


@torch.no_grad()
def adamw_triton(
    tensors: Sequence[AdamWTensors], factors: Tensor, beta1: float, beta2: float, eps: float
) -> None:
    """One pass over memory."""
    from blackmamba.ops.adamw.kernels import adamw

    adamw(tensors, factors, beta1, beta2, eps)


@torch.no_grad()
def global_norm_triton(tensors: Sequence[Tensor]) -> Tensor:
    """One pass over memory."""
    from blackmamba.ops.adamw.kernels import global_norm

    return global_norm([t.contiguous() for t in tensors])
