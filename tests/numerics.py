"""How near is near enough: errors are judged by what plain PyTorch gets wrong in the same dtype."""

import torch
from torch import Tensor


def largest_difference(a: Tensor, b: Tensor) -> float:
    """max |a - b| in float64; NaN if either holds one."""
    return (a.double() - b.double()).abs().max().item()


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """max |actual - exact| / max |exact|; 0 for empty tensors."""
    if exact.numel() == 0:
        return 0.0
    scale = exact.double().abs().max().item()
    return largest_difference(actual, exact) / (scale or 1.0)


def assert_within_budget(
    name: str, actual: Tensor, eager: Tensor, exact: Tensor, factor: float = 2.0
) -> None:
    """`actual` may be `factor` times as wrong as plain PyTorch in its dtype; `exact` is float64."""
    assert (actual.shape, actual.dtype) == (exact.shape, eager.dtype), name
    if exact.numel() == 0:
        return
    error, allowed = largest_difference(actual, exact), largest_difference(eager, exact)
    budget = factor * allowed + torch.finfo(eager.dtype).eps * exact.abs().max().item()
    assert error <= budget, f"{name}: error {error:.2e}, budget {budget:.2e}"  # NaN fails too
