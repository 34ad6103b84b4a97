"""What `expert_mlp` means: each token multiplied by the weights of its own experts."""

import torch
from torch import Tensor

from blackmamba.ops.activate.reference import activate_reference
from blackmamba.ops.expert_mlp.choices import choices_per_token, repeated


def expert_mlp_reference(
    x: Tensor,
    expert_ids: Tensor,
    fc1: Tensor,
    fc2: Tensor,
    activation: str,
    gated: bool,
    fc1_bias: Tensor | None,
    fc2_bias: Tensor | None,
    gate: Tensor | None,
) -> Tensor:
    """Copies an expert's weights for every token: for small inputs. Float64 in, float64 out."""
    x = repeated(x, choices_per_token(x, expert_ids))
    h = torch.einsum("tm,tfm->tf", x, fc1.to(x.dtype)[expert_ids])
    if fc1_bias is not None:
        h = h + fc1_bias.to(x.dtype)[expert_ids]
    h = activate_reference(h, activation, gated)
    y = torch.einsum("tf,tmf->tm", h, fc2.to(x.dtype)[expert_ids])
    if fc2_bias is not None:
        y = y + fc2_bias.to(x.dtype)[expert_ids]
    return y if gate is None else (y * gate[:, None]).to(x.dtype)
