"""A few tokens by kernels that read each chosen expert's weights once; many by grouped products.

Up to 16 choices the weights are what costs, and the kernels stream them. From 64 on, float32 goes
by the native products, and so does bfloat16 where it is widened for them or multiplied by matrix
units (native/bfloat16.py); in training it goes in pairs where the processor multiplies those fast.
All else is by torch's, and only what lies between those products is native.
"""

from typing import Literal

import torch
from torch import Tensor

from blackmamba.ops import native
from blackmamba.ops.expert_mlp.choices import choices_per_token, repeated
from blackmamba.ops.expert_mlp.native_grouped import expert_mlp_native_grouped
from blackmamba.ops.expert_mlp.native_pairs import expert_mlp_native_pairs, pairs_fit
from blackmamba.ops.expert_mlp.torch_grouped import expert_mlp_grouped
from blackmamba.ops.linear.native import takes

FEW = 16
MANY = 64  # below, groups are so short that packing a weight costs more than it saves


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
    if n_choices >= MANY and takes(x.dtype):
        return expert_mlp_native_grouped(
            x, expert_ids, fc1, fc2, activation, gated, fc1_bias, fc2_bias, gate
        )
    tensors = (x, fc1, fc2, fc1_bias, fc2_bias, gate)
    learns = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    is_plain = fc1_bias is None and fc2_bias is None
    if n_choices >= MANY and learns and is_plain and pairs_fit(x, fc1, fc2):
        return expert_mlp_native_pairs(x, expert_ids, fc1, fc2, activation, gated, gate)
    if n_choices > FEW or learns or native.unfit(fc1, fc2) is not None or fc1.dtype != fc2.dtype:
        return expert_mlp_grouped(
            x, expert_ids, fc1, fc2, activation, gated, fc1_bias, fc2_bias, gate
        )
    return _few_tokens(
        x, expert_ids, fc1, fc2, fc1_bias, fc2_bias, gate, gated, activation == "gelu"
    )


@torch.library.custom_op("blackmamba::expert_mlp_few_tokens", mutates_args=())
def _few_tokens(
    x: Tensor,
    expert_ids: Tensor,
    fc1: Tensor,
    fc2: Tensor,
    fc1_bias: Tensor | None,
    fc2_bias: Tensor | None,
    gate: Tensor | None,
    gated: bool,
    gelu: bool,
) -> Tensor:
    """No gradient."""
    x = native.rows(repeated(x, choices_per_token(x, expert_ids)))
    expert_ids = expert_ids.contiguous()
    fc1, fc2 = fc1.contiguous(), fc2.contiguous()
    floats = [None if t is None else t.float().contiguous() for t in (fc1_bias, fc2_bias, gate)]
    y = torch.empty(x.shape, dtype=x.dtype)
    native.extension().expert_mlp_few_tokens(
        x.data_ptr(),
        x.stride(0),
        expert_ids.data_ptr(),
        fc1.data_ptr(),
        fc2.data_ptr(),
        *(0 if t is None else t.data_ptr() for t in floats),
        y.data_ptr(),
        len(x),
        *fc1.shape,
        fc2.shape[2],
        x.dtype == torch.bfloat16,
        fc1.dtype == torch.bfloat16,
        gated,
        gelu,
        torch.get_num_threads(),
    )
    return y


@_few_tokens.register_fake
def _(x: Tensor, expert_ids: Tensor, *_: object) -> Tensor:
    return x.new_empty(expert_ids.shape[0], x.shape[1])
