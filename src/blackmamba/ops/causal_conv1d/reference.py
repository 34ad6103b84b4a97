"""What `causal_conv1d` means: a dot product over the last k inputs, for each time and channel."""

import torch
from torch import Tensor
from torch.nn import functional as F

from blackmamba.ops.checks import wide_dtype


def causal_conv1d_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    before: Tensor | None,
    seq_idx: Tensor | None,
    activation: str,
) -> Tensor:
    """Float64 in, float64 out."""
    wide = wide_dtype(x)
    (b, l, d), k = x.shape, weight.shape[1]
    if l == 0:
        return torch.zeros_like(x)
    if before is None:
        before = x.new_zeros(b, d, k - 1)
    seen_bdt = torch.cat((before, x.transpose(1, 2)), dim=2).to(wide)
    windows_bdlk = seen_bdt.unfold(2, k, 1)
    if seq_idx is not None:
        seen_idx = torch.cat((seq_idx[:, :1].expand(b, k - 1), seq_idx), dim=1)
        same_blk = seen_idx.unfold(1, k, 1) == seq_idx[:, :, None]
        windows_bdlk = windows_bdlk.where(same_blk[:, None], windows_bdlk.new_zeros(()))
    y_bdl = (windows_bdlk * weight.to(wide)[:, None, :]).sum(-1)
    if bias is not None:
        y_bdl = y_bdl + bias.to(wide)[:, None]
    if activation == "silu":
        y_bdl = F.silu(y_bdl)
    return y_bdl.transpose(1, 2).to(x.dtype)
