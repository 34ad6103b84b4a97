"""What a quantised model has in the place of a parameter, a linear layer or an embedding."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from blackmamba.ops.quantized_linear import (
    QuantizedWeight,
    dequantize,
    quantize_weight,
    quantized_linear,
    storage_dtype,
    storage_shapes,
)


class QuantizedStorage(nn.Module):
    """The numbers of one quantised parameter: buffers `data` and `scales`.

    Args:
        shape: (o, i) or (e, o, i), of the parameter that it stands for.
        bits: 8 or 4.
        group_size: columns that share a scale.
        device: of the buffers, which are not filled.
    """

    data: Tensor
    scales: Tensor

    def __init__(
        self, shape: tuple[int, ...], bits: int, group_size: int, *, device: torch.device | None
    ):
        super().__init__()
        self.shape, self.bits, self.group_size = shape, bits, group_size
        data, scales = storage_shapes(shape, bits, group_size)
        self.register_buffer("data", torch.empty(data, dtype=storage_dtype(bits), device=device))
        self.register_buffer("scales", torch.empty(scales, dtype=torch.bfloat16, device=device))

    @property
    def device(self) -> torch.device:
        return self.data.device

    def stored(self) -> QuantizedWeight:
        """The numbers as the operations take them; shares their memory."""
        return QuantizedWeight(self.data, self.scales, self.group_size, self.shape[-1])

    def whole(self, dtype: torch.dtype) -> Tensor:
        """The parameter written out."""
        return dequantize(self.stored(), dtype)

    def fill_from(self, weight: Tensor) -> None:
        """Quantise a parameter of the same shape into this one."""
        made = quantize_weight(weight, self.bits, self.group_size)
        self.data.copy_(made.data)
        self.scales.copy_(made.scales)

    def extra_repr(self) -> str:
        return f"{tuple(self.shape)}, {self.bits} bits, groups of {self.group_size}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantizedStorage":
        """Moves go through; a change of the model's dtype leaves the scales as they are."""
        scales = self.scales
        super()._apply(fn, recurse)
        if self.scales.dtype != scales.dtype:
            self.scales = scales.to(self.scales.device)
        return self


class QuantizedLinear(nn.Module):
    """`Linear` whose matrix is quantised; the bias is a parameter as ever."""

    def __init__(self, weight: QuantizedStorage, bias: nn.Parameter | None):
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features), in the input's dtype."""
        return quantized_linear(input, self.weight.stored(), self.bias)


class QuantizedEmbedding(nn.Module):
    """nn.Embedding whose table is quantised; a lookup writes out the rows that it gives."""

    def __init__(self, weight: QuantizedStorage, dtype: torch.dtype):
        super().__init__()
        self.weight, self.dtype = weight, dtype

    def forward(self, input: Tensor) -> Tensor:
        """Ids (...) to rows (..., m)."""
        return dequantize(self.weight.stored()[input], self.dtype)
