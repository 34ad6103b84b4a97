"""`adamw_` by Triton."""

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
