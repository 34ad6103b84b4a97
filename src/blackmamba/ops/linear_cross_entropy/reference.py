"""What `linear_cross_entropy` means."""

from torch import Tensor
from torch.nn import functional as F

from blackmamba.ops.checks import wide_dtype


def linear_cross_entropy_reference(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    divisor: Tensor | None,
) -> Tensor:
    """All logits at once; float64 in, float64 out."""
    bias = None if bias is None else bias.to(x.dtype)
    logits = F.linear(x, weight.to(x.dtype), bias).to(wide_dtype(x))
    total = F.cross_entropy(logits, labels, ignore_index=ignore_index, reduction="sum")
    return total if divisor is None else total / divisor
