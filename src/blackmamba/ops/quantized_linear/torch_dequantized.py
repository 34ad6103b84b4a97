"""The matrix a few rows at a time in x's dtype, then torch's own product: good for many rows of x.

For one row the copy costs more than the product; that is what the native version is for.
"""

import torch
from torch import Tensor

from blackmamba.ops.linear import linear
from blackmamba.ops.quantized_linear.weights import QuantizedWeight, dequantize

_CHUNK = 1 << 20  # numbers of the matrix at a time: little memory, and still in the cache


def quantized_linear_dequantized(x: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> Tensor:
    """`quantized_linear`; the matrix is rounded to x's dtype."""
    o, i = weight.shape
    rows = max(1, _CHUNK // max(1, i))
    if o <= rows:
        y = linear(x, dequantize(weight, x.dtype))
    else:
        parts = [weight[start : start + rows] for start in range(0, o, rows)]
        y = torch.cat([linear(x, dequantize(part, x.dtype)) for part in parts], dim=-1)
    return y if bias is None else y + bias.to(x.dtype)
