"""The choice of experts in C++."""

import torch
from torch import Tensor

from blackmamba.ops import native


def choice(
    logits: Tensor, scale: float, start: str, tolerance: float, max_iterations: int
) -> Tensor:
    """`sinkhorn_choice` in float32; by one thread, so the same on any number of them."""
    wide = logits.float().contiguous()
    ids = wide.new_empty(len(wide), dtype=torch.int64)
    native.extension().sinkhorn_choice(
        wide.data_ptr(), *wide.shape, scale, start == "paper", tolerance, max_iterations,
        ids.data_ptr(),
    )  # fmt: skip
    return ids
