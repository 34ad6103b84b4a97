"""A few tokens by kernels that read each chosen expert's weights once."""

import torch
from torch import Tensor

from blackmamba.ops import native
from blackmamba.ops.expert_mlp.choices import choices_per_token, repeated


def run_few_tokens(
    x: Tensor,
    expert_ids: Tensor,
    fc1: Tensor,
    fc2: Tensor,
    fc1_bias: Tensor | None,
    fc2_bias: Tensor | None,
    gate: Tensor | None,
    gated: bool,
    gelu: bool,
    h: Tensor | None = None,
) -> Tensor:
    """y of float32 or bfloat16, in float32 arithmetic; no gradient.

    Args:
        h: (t, 2f) or (t, f) float32, contiguous; written: fc1's output, sorted by expert.
    """
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
        0 if h is None else h.data_ptr(),
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


@torch.library.custom_op("blackmamba::expert_mlp_few_tokens", mutates_args=())
def few_tokens(
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
    return run_few_tokens(x, expert_ids, fc1, fc2, fc1_bias, fc2_bias, gate, gated, gelu)


@few_tokens.register_fake
def _(x: Tensor, expert_ids: Tensor, *_: object) -> Tensor:
    return x.new_empty(expert_ids.shape[0], x.shape[1])
