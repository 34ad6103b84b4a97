"""A matrix product with a layer's weight."""

from torch import Tensor

from blackmamba.errors import InputError
from blackmamba.ops.backend import Backend, Implementations
from blackmamba.ops.checks import check_dims, check_floating, check_shapes
from blackmamba.ops.linear.products import (
    is_by_native,
    linear_native,
    linear_onednn,
    product,
)
from blackmamba.ops.linear.reference import linear_reference

__all__ = ["is_by_native", "linear", "product"]

_IMPLEMENTATIONS = Implementations(
    "linear",
    {"native": linear_native, "torch": linear_onednn, "reference": linear_reference},
)


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: Backend = "auto"
) -> Tensor:
    """weight x + bias, over the last dimension.

    Args:
        x: (..., k), any floating-point dtype.
        weight: (n, k), in x's dtype.
        bias: (n,), in x's dtype.
        backend: see ops/backend.py.
    Returns:
        (..., n) in x's dtype.
    Raises:
        InputError: a shape or dtype is wrong.
        BackendError: `backend` cannot run.
    """
    name = "linear"
    check_dims(name, "weight", weight, "nk")
    check_floating(name, x=x)
    n, k = weight.shape
    if x.shape[-1:] != (k,):
        raise InputError(f"{name}: x has shape {tuple(x.shape)}, must be (..., {k})")
    check_shapes(name, bias=(bias, (n,)))
    for what, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != x.dtype:
            raise InputError(f"{name}: {what} is {tensor.dtype}, must be {x.dtype} as x is")
    return _IMPLEMENTATIONS.pick(backend, x)(x, weight, bias)
