"""Tokens grouped by expert; only the experts that have some are written out, one at a time."""

from typing import Literal

import torch
from torch import Tensor

from blackmamba.ops.activate import activate
from blackmamba.ops.quantized_linear import QuantizedWeight, quantized_linear


def quantized_expert_mlp_grouped(
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
    """`quantized_expert_mlp`; waits for the device to know which experts have tokens."""
    y = torch.empty_like(x)
    for chosen in torch.unique(expert_ids).tolist():
        rows = (expert_ids == chosen).nonzero()[:, 0]
        h = quantized_linear(x[rows], fc1[chosen], _row(fc1_bias, chosen), backend="torch")
        h = activate(h, activation, gated)
        y[rows] = quantized_linear(h, fc2[chosen], _row(fc2_bias, chosen), backend="torch")
    return y if gate is None else (y * gate[:, None]).to(x.dtype)


def _row(bias: Tensor | None, chosen: int) -> Tensor | None:
    return None if bias is None else bias[chosen]
