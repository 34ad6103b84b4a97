"""What `rotary` means, in PyTorch's own operations."""

import torch
from torch import Tensor


def rotary_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Float64 in, float64 out."""
    wide = torch.promote_types(x.dtype, torch.float32)
    first, second = x.to(wide).split(cos.shape[-1], dim=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)
