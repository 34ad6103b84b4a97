"""A linear layer whose matrix is stored in 8 or 4 bits."""

import torch
from torch import Tensor

from blackmamba.errors import InputError
from blackmamba.ops.backend import Backend, Implementations
from blackmamba.ops.checks import check_floating, check_shapes
from blackmamba.ops.quantized_linear.native import quantized_linear_native
from blackmamba.ops.quantized_linear.reference import quantized_linear_reference
from blackmamba.ops.quantized_linear.torch_dequantized import quantized_linear_dequantized
from blackmamba.ops.quantized_linear.weights import (
    BITS,
    GROUP_SIZES,
    QuantizedWeight,
    check_scheme,
    dequantize,
    quantize_weight,
    storage_dtype,
    storage_shapes,
)

__all__ = [
    "BITS",
    "GROUP_SIZES",
    "QuantizedWeight",
    "check_inference",
    "check_scheme",
    "check_weight",
    "dequantize",
    "quantize_weight",
    "quantized_linear",
    "storage_dtype",
    "storage_shapes",
]

_IMPLEMENTATIONS = Implementations(
    "quantized_linear",
    {
        "native": quantized_linear_native,
        "torch": quantized_linear_dequantized,
        "reference": quantized_linear_reference,
    },
)


def quantized_linear(
    x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None, *, backend: Backend = "auto"
) -> Tensor:
    """y = W x + bias with the matrix W that `weight` stands for; for inference only.

    Args:
        x: (..., i), any floating-point dtype.
        weight: (o, i) in 8 or 4 bits, see weights.py.
        bias: (o,), cast to x's dtype.
        backend: see ops/backend.py.
    Returns:
        (..., o) in x's dtype.
    Raises:
        InputError: a shape or dtype is wrong, or x requires a gradient.
        BackendError: `backend` cannot run.
    """
    name = "quantized_linear"
    check_floating(name, x=x, bias=bias)
    check_weight(name, "weight", weight, 2)
    if x.dim() < 1 or x.shape[-1] != weight.n_columns:
        raise InputError(f"{name}: x has shape {tuple(x.shape)}, must be (..., {weight.n_columns})")
    check_shapes(name, bias=(bias, weight.shape[:1]))
    check_inference(name, x)
    return _IMPLEMENTATIONS.pick(backend, x)(x, weight, bias)


def check_weight(operation: str, name: str, weight: QuantizedWeight, n_dims: int) -> None:
    """Compare the parts of a quantised weight with each other.

    Raises:
        InputError: the number of dimensions, a shape or a dtype is wrong.
        ConfigError: no such group size.
    """
    if len(weight.shape) != n_dims:
        letters = "(e, o, i)" if n_dims == 3 else "(o, i)"
        raise InputError(f"{operation}: {name} has shape {weight.shape}, must be {letters}")
    data, scales = storage_shapes(weight.shape, weight.bits, weight.group_size)
    check_shapes(
        operation,
        **{f"{name}.data": (weight.data, data), f"{name}.scales": (weight.scales, scales)},
    )
    if weight.data.dtype != storage_dtype(weight.bits) or weight.scales.dtype != torch.bfloat16:
        raise InputError(
            f"{operation}: {name} is of {weight.data.dtype} and {weight.scales.dtype}, must be of "
            "torch.int8 or torch.uint8 and torch.bfloat16"
        )


def check_inference(operation: str, *inputs: Tensor | None) -> None:
    """Quantised weights give no gradient, neither their own nor that of what they multiply.

    Raises:
        InputError: one of these is asked for.
    """
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        raise InputError(
            f"{operation}: the input requires a gradient, but a quantised model is for inference "
            "only; run it in torch.no_grad(), or train the model that it was made from"
        )
