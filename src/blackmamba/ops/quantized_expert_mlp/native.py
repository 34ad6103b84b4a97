"""A few tokens by the kernels of `expert_mlp`, which take weights of any kind; many by torch.

Measured on two Zen 5 cores: up to 64 tokens an expert the kernels win, by 1.1 to 20 times.
"""

from typing import Literal

import torch
from torch import Tensor

from blackmamba.ops import native
from blackmamba.ops.quantized_expert_mlp.torch_grouped import quantized_expert_mlp_grouped
from blackmamba.ops.quantized_linear import QuantizedWeight
from blackmamba.ops.quantized_linear.native import FEW, KINDS


def quantized_expert_mlp_native(
    x: Tensor,
    expert_ids: Tensor,
    fc1: QuantizedWeight,
    fc2: QuantizedWeight,
    activation: Literal["silu", "gelu"],
    gated: bool,
    fc1_bias: Tensor | None,
    fc2_bias: Tensor | None,
    gate: Tensor | None,
) -> Tensor:
    """`quantized_expert_mlp` of float32 or bfloat16; few tokens in float32 arithmetic."""
    if len(x) > FEW * len(fc1.data):
        return quantized_expert_mlp_grouped(
            x, expert_ids, fc1, fc2, activation, gated, fc1_bias, fc2_bias, gate
        )
    weights = (fc1.data, fc1.scales, fc1.group_size, fc2.data, fc2.scales, fc2.group_size)
    extras = (fc1_bias, fc2_bias, gate)
    return _few_tokens(x, expert_ids, *weights, *extras, fc2.n_columns, gated, activation == "gelu")


@torch.library.custom_op("blackmamba::quantized_expert_mlp", mutates_args=())
def _few_tokens(
    x: Tensor,
    expert_ids: Tensor,
    fc1_data: Tensor,
    fc1_scales: Tensor,
    fc1_group: int,
    fc2_data: Tensor,
    fc2_scales: Tensor,
    fc2_group: int,
    fc1_bias: Tensor | None,
    fc2_bias: Tensor | None,
    gate: Tensor | None,
    f: int,
    gated: bool,
    gelu: bool,
) -> Tensor:
    """No gradient."""
    x, expert_ids = native.rows(x), expert_ids.contiguous()
    weights = [t.contiguous() for t in (fc1_data, fc1_scales, fc2_data, fc2_scales)]
    floats = [None if t is None else t.float().contiguous() for t in (fc1_bias, fc2_bias, gate)]
    y = torch.empty(x.shape, dtype=x.dtype)
    native.extension().quantized_expert_mlp(
        x.data_ptr(),
        x.stride(0),
        expert_ids.data_ptr(),
        *(t.data_ptr() for t in weights),
        (KINDS[fc1_data.dtype], KINDS[fc2_data.dtype]),
        (fc1_group, fc2_group),
        *(0 if t is None else t.data_ptr() for t in floats),
        y.data_ptr(),
        (len(x), *fc1_data.shape[:2], x.shape[1], f),
        x.dtype == torch.bfloat16,
        gated,
        gelu,
        torch.get_num_threads(),
    )
    return y


@_few_tokens.register_fake
def _(x: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape)
