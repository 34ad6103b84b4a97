"""What `activate` means, in PyTorch's own operations."""

from torch import Tensor
from torch.nn import functional as F


def activate_reference(h: Tensor, activation: str, gated: bool) -> Tensor:
    """Float64 in, float64 out."""
    act = F.silu if activation == "silu" else F.gelu
    if not gated:
        return act(h)
    g, u = h.chunk(2, dim=-1)
    return act(g) * u
