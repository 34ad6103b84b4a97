"""What `rms_norm` means. PyTorch's own fused operation is as short as the formula."""

import torch
from torch import Tensor
from torch.nn import functional as F

from blackmamba.ops.checks import wide_dtype


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float, out_dtype: torch.dtype) -> Tensor:
    """Float64 in, float64 computed."""
    wide = wide_dtype(x)
    return F.rms_norm(x.to(wide), (x.shape[-1],), weight.to(wide), eps).to(out_dtype)


def add_rms_norm_reference(
    x: Tensor, update: Tensor, weight: Tensor, eps: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """One after the other."""
    total = (x + update).to(x.dtype)
    return total, rms_norm_reference(total, weight, eps, out_dtype)
