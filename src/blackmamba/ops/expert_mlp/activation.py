"""The non-linearity of experts and dense feed-forward layers."""

from torch import Tensor
from torch.nn import functional as F


def activate(h: Tensor, activation: str, gated: bool) -> Tensor:
    """act(g) * u of [g | u] (..., 2f), or act(h) of (..., f); "gelu" is the exact, erf form."""
    act = F.silu if activation == "silu" else F.gelu
    if not gated:
        return act(h)
    g, u = h.chunk(2, dim=-1)
    return act(g) * u
