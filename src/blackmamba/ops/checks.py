"""Checks of what an operation is called with."""

from collections.abc import Sequence

import torch
from torch import Tensor

from blackmamba.errors import InputError


def check_shapes(operation: str, **expected: tuple[Tensor | None, Sequence[int]]) -> None:
    """Compare shapes; None arguments are absent and pass.

    Raises:
        InputError: names every tensor whose shape disagrees, with what would be right.
    """
    wrong = [
        f"{name} has shape {tuple(tensor.shape)}, must be {tuple(shape)}"
        for name, (tensor, shape) in expected.items()
        if tensor is not None and tuple(tensor.shape) != tuple(shape)
    ]
    if wrong:
        raise InputError(f"{operation}: {'; '.join(wrong)}")


def check_dims(operation: str, name: str, tensor: Tensor, letters: str) -> None:
    """Check the number of dimensions, named by one letter each.

    Raises:
        InputError: it differs.
    """
    if tensor.dim() != len(letters):
        raise InputError(
            f"{operation}: {name} has shape {tuple(tensor.shape)}, must be ({', '.join(letters)})"
        )


def check_floating(operation: str, name: str, tensor: Tensor) -> None:
    """Check for a floating-point dtype.

    Raises:
        InputError: it is none.
    """
    if not tensor.dtype.is_floating_point:
        raise InputError(f"{operation}: {name} is {tensor.dtype}, must be a floating-point dtype")


def wide_dtype(tensor: Tensor) -> torch.dtype:
    """float32, or the tensor's own dtype if that is wider: what accumulations are done in."""
    return torch.promote_types(tensor.dtype, torch.float32)
