"""A few vectors by kernels that read each weight once (cpu.cpp); many by torch's products.

Measured on two Zen 5 cores: up to 64 vectors the kernels win, by 1.2 to 25 times; then torch does.
"""

import torch
from torch import Tensor

from blackmamba.ops import native
from blackmamba.ops.quantized_linear.torch_dequantized import quantized_linear_dequantized
from blackmamba.ops.quantized_linear.weights import QuantizedWeight

FEW = 64
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2, torch.uint8: 3}
"""WeightKind of native/weights.hpp."""


def quantized_linear_native(x: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> Tensor:
    """`quantized_linear` of float32 or bfloat16; few vectors in float32 arithmetic,
    bfloat16's in whole numbers of 16 bits where the processor has AVX512-VNNI."""
    if x.numel() > FEW * weight.n_columns:
        return quantized_linear_dequantized(x, weight, bias)
    data, scales, group_size = weight.data, weight.scales, weight.group_size
    return _few_vectors(x, data, scales, group_size, bias)


@torch.library.custom_op("blackmamba::quantized_linear", mutates_args=())
def _few_vectors(
    x: Tensor, data: Tensor, scales: Tensor, group_size: int, bias: Tensor | None
) -> Tensor:
    """No gradient."""
    rows = native.rows(x)
    data, scales = data.contiguous(), scales.contiguous()
    bias = None if bias is None else bias.float().contiguous()
    y = x.new_empty(*x.shape[:-1], len(data))
    native.extension().weight_product(
        rows.data_ptr(),
        rows.stride(0),
        len(rows),
        x.dtype == torch.bfloat16,
        KINDS[data.dtype],
        data.data_ptr(),
        scales.data_ptr(),
        len(data),
        x.shape[-1],
        group_size,
        x.dtype == torch.bfloat16,
        0 if bias is None else bias.data_ptr(),
        y.data_ptr(),
        torch.get_num_threads(),
    )
    return y


@_few_vectors.register_fake
def _(x: Tensor, data: Tensor, scales: Tensor, group_size: int, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], data.shape[0])
