"""The routed feed-forward layer: each token goes through one of many experts.

Letters: t tokens, m d_model, f d_expert, e experts.

Source: BlackMamba (arXiv 2402.01771); Fedus et al. 2021 (arXiv 2101.03961), eq. 2, with one expert
a token and a sigmoid gate.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from blackmamba.config import ModelConfig
from blackmamba.model.quantized import QuantizedStorage
from blackmamba.model.router import Router, Routing
from blackmamba.ops import expert_mlp, quantized_expert_mlp


class MoE(nn.Module):
    """y_t = sigmoid(logit of the chosen expert) * expert(x_t). Experts are stored stacked."""

    def __init__(
        self,
        config: ModelConfig,
        n_experts: int,
        *,
        device: torch.device | None,
        dtype: torch.dtype,
        wide: torch.dtype,
    ):
        super().__init__()
        m, f = config.d_model, config.d_expert
        rows = 2 * f if config.gated else f
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.activation: Literal["silu", "gelu"] = config.activation
        self.gated = config.gated
        self.router = Router(config, n_experts, device=device, dtype=wide)
        self.fc1: nn.Parameter | QuantizedStorage = nn.Parameter(  # rows [gate | up]
            torch.empty(n_experts, rows, m, **options)
        )
        self.fc2: nn.Parameter | QuantizedStorage = nn.Parameter(
            torch.empty(n_experts, m, f, **options)
        )
        if config.linear_bias:
            self.fc1_bias = nn.Parameter(torch.empty(n_experts, rows, **options))
            self.fc2_bias = nn.Parameter(torch.empty(n_experts, m, **options))
        else:
            self.fc1_bias = self.fc2_bias = None

    def forward(self, x: Tensor) -> tuple[Tensor, Routing]:
        """(..., m) to (..., m), and where each token went (tokens in row-major order)."""
        x_tm = x.reshape(-1, x.shape[-1])
        routing = self.router(x_tm)
        options: dict[str, Any] = {
            "activation": self.activation,
            "gated": self.gated,
            "fc1_bias": self.fc1_bias,
            "fc2_bias": self.fc2_bias,
            "gate": routing.gate,
        }
        fc1, fc2 = self.fc1, self.fc2
        if isinstance(fc1, QuantizedStorage) and isinstance(fc2, QuantizedStorage):
            y_tm = quantized_expert_mlp(
                x_tm, routing.expert_ids, fc1.stored(), fc2.stored(), **options
            )
        else:
            assert isinstance(fc1, Tensor)
            assert isinstance(fc2, Tensor)
            y_tm = expert_mlp(x_tm, routing.expert_ids, fc1, fc2, **options)
        return y_tm.view(x.shape), routing
