"""What `quantized_linear` means: the product with the matrix that the stored one stands for."""

from torch import Tensor
from torch.nn import functional as F

from blackmamba.ops.checks import wide_dtype
from blackmamba.ops.quantized_linear.weights import QuantizedWeight, dequantize


def quantized_linear_reference(x: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> Tensor:
    """Computed in float32 or wider. Float64 in, float64 out."""
    wide = wide_dtype(x)
    bias = None if bias is None else bias.to(wide)
    return F.linear(x.to(wide), dequantize(weight, wide), bias).to(x.dtype)
