"""What `causal_conv1d` means: a dot product over the last k inputs, for each time and channel."""

import torch
from torch import Tensor
from torch.nn import functional as F

from blackmamba.ops.checks import wide_dtype


def causal_conv1d_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, before: Tensor, activation: str
) -> Tensor:
    """Float64 in, float64 out."""
    wide = wide_dtype(x)
    seen_bdt = torch.cat((before, x.transpose(1, 2)), dim=2).to(wide)
    if x.shape[1] == 0:
        return torch.zeros_like(x)
    windows_bdlk = seen_bdt.unfold(2, weight.shape[1], 1)
    y_bdl = (windows_bdlk * weight.to(wide)[:, None, :]).sum(-1)
    if bias is not None:
        y_bdl = y_bdl + bias.to(wide)[:, None]
    if activation == "silu":
        y_bdl = F.silu(y_bdl)
    return y_bdl.transpose(1, 2).to(x.dtype)
