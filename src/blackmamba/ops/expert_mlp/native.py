"""A few tokens by kernels that read each chosen expert's weights once; many by grouped products.

Up to 16 choices without gradients the weights are what costs, and the kernels stream them. More of
float32, and all that have gradients, go by the native products (native_grouped.py). From 64 on so
does bfloat16 where it is widened for them or multiplied by matrix units (native/bfloat16.py); in
training it goes in pairs where the processor multiplies those fast. All else is by torch's, and
only what lies between those products is native.
"""

from typing import Literal

import torch
from torch import Tensor

from blackmamba.ops import native
from blackmamba.ops.expert_mlp.native_few import few_tokens
from blackmamba.ops.expert_mlp.native_grouped import expert_mlp_native_grouped
from blackmamba.ops.expert_mlp.native_pairs import expert_mlp_native_pairs, pairs_fit
from blackmamba.ops.expert_mlp.torch_grouped import expert_mlp_grouped
from blackmamba.ops.linear.native import takes

FEW = 16
MANY = 64  # of bfloat16; below, packing a weight costs more than it saves


def expert_mlp_native(
    x: Tensor,
    expert_ids: Tensor,
    fc1: Tensor,
    fc2: Tensor,
    activation: Literal["silu", "gelu"],
    gated: bool,
    fc1_bias: Tensor | None,
    fc2_bias: Tensor | None,
    gate: Tensor | None,
) -> Tensor:
    """`expert_mlp` of float32 or bfloat16; few tokens without gradients in float32 arithmetic."""
    n_choices = len(expert_ids)
    tensors = (x, fc1, fc2, fc1_bias, fc2_bias, gate)
    learns = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    is_float32 = x.dtype == fc1.dtype == fc2.dtype == torch.float32
    few = 0 if learns else FEW
    if (n_choices >= MANY and takes(x.dtype)) or (n_choices > few and is_float32):
        return expert_mlp_native_grouped(
            x, expert_ids, fc1, fc2, activation, gated, fc1_bias, fc2_bias, gate
        )
    is_plain = fc1_bias is None and fc2_bias is None
    if n_choices >= MANY and learns and is_plain and pairs_fit(x, fc1, fc2):
        return expert_mlp_native_pairs(x, expert_ids, fc1, fc2, activation, gated, gate)
    if n_choices > FEW or learns or native.unfit(fc1, fc2) is not None or fc1.dtype != fc2.dtype:
        return expert_mlp_grouped(
            x, expert_ids, fc1, fc2, activation, gated, fc1_bias, fc2_bias, gate
        )
    return few_tokens(
        x, expert_ids, fc1, fc2, fc1_bias, fc2_bias, gate, gated, activation == "gelu"
    )
