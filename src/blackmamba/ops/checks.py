"""Checks of what an operation is called with."""

from collections.abc import Sequence

import torch
from torch import Tensor

from blackmamba.errors import InputError
from blackmamba.ops import native


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


def check_floating(operation: str, **tensors: Tensor | None) -> None:
    """Check for floating-point dtypes; None arguments are absent and pass.

    Raises:
        InputError: one has another dtype.
    """
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.dtype.is_floating_point:
            raise InputError(
                f"{operation}: {name} is {tensor.dtype}, must be a floating-point dtype"
            )


def check_any_integers(operation: str, name: str, tensor: Tensor) -> None:
    """Check for an integer dtype.

    Raises:
        InputError: it has another.
    """
    if tensor.dtype.is_floating_point or tensor.dtype.is_complex or tensor.dtype == torch.bool:
        raise InputError(f"{operation}: {name} is {tensor.dtype}, must be an integer dtype")


def check_integers(
    operation: str, name: str, tensor: Tensor, last: int, ignored: int | None = None
) -> None:
    """Check for int64 and, where that costs no waiting, for values of 0 .. last.

    Args:
        ignored: a value that may be there besides.
    Raises:
        InputError: another dtype, or a value out of range.
    """
    if tensor.dtype != torch.int64:
        raise InputError(f"{operation}: {name} is {tensor.dtype}, must be torch.int64")
    if not readable(tensor):
        return
    if native.missing() is None and tensor.is_contiguous():  # a quarter of what torch's calls cost
        beside = 0 if ignored is None else ignored
        if native.extension().all_within(tensor.data_ptr(), tensor.numel(), last, beside):
            return
    wrong = (tensor < 0) | (tensor > last)
    if ignored is not None:
        wrong &= tensor != ignored
    if wrong.any():
        raise InputError(
            f"{operation}: {name} holds {tensor[wrong][0]}, must be 0 .. {last}"
            + ("" if ignored is None else f" or {ignored}")
        )


def readable(tensor: Tensor) -> bool:
    """Whether its values can be looked at: on CPU, and neither fake nor being compiled."""
    return (
        tensor.device.type == "cpu" and type(tensor) is Tensor and not torch.compiler.is_compiling()
    )


def wide_dtype(tensor: Tensor) -> torch.dtype:
    """float32, or the tensor's own dtype if that is wider: what accumulations are done in."""
    return torch.promote_types(tensor.dtype, torch.float32)
