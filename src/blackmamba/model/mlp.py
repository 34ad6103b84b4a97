"""The dense feed-forward layer, or shared expert; a routed expert computes the same.

Source: Shazeer 2020 (arXiv 2002.05202), eq. 5 and 6 (SwiGLU is the gated form with SiLU).
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from blackmamba.config import ModelConfig
from blackmamba.model.linear import Linear
from blackmamba.ops import activate


class MLP(nn.Module):
    """fc2(act(gate) * up), where fc1 gives [gate | up]; not gated: fc2(act(fc1(x)))."""

    def __init__(
        self,
        config: ModelConfig,
        width: int,
        *,
        device: torch.device | None,
        dtype: torch.dtype,
    ):
        super().__init__()
        m, f = config.d_model, width
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.activation: Literal["silu", "gelu"] = config.activation
        self.gated = config.gated
        self.fc1 = Linear(m, 2 * f if config.gated else f, bias=config.linear_bias, **options)
        self.fc2 = Linear(f, m, bias=config.linear_bias, **options)

    def forward(self, x: Tensor) -> Tensor:
        """(..., m) to (..., m)."""
        return self.fc2(activate(self.fc1(x), self.activation, self.gated))
