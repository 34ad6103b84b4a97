"""The routed feed-forward layer: each token goes through one or a few of many experts.

Letters: t tokens, m d_model, f d_expert, e experts.

Source: BlackMamba (arXiv 2402.01771); Fedus et al. 2021 (arXiv 2101.03961), eq. 2; Dai et al. 2024
(arXiv 2401.06066), eq. 9, for the shared expert.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from blackmamba.config import ModelConfig
from blackmamba.model.mlp import MLP
from blackmamba.model.quantized import QuantizedStorage
from blackmamba.model.router import Router, Routing
from blackmamba.ops import expert_mlp, frozen_expert_mlp, quantized_expert_mlp


class MoE(nn.Module):
    """y_t = sum over the chosen experts of gate * expert(x_t), and shared(x_t) if there is one.

    Routed experts are stored stacked.
    """

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
        self.shared: MLP | None = None
        if config.d_shared_expert:
            self.shared = MLP(config, config.d_shared_expert, **options)
        self.spread_experts: Callable[..., Tensor] | None = None
        """What takes the place of `expert_mlp` where experts are spread over processes; it takes
        `plus`, too."""

    def forward(self, x: Tensor, *, balanced: bool | None = None) -> tuple[Tensor, Routing]:
        """(..., m) to (..., m), and where each token went (tokens in row-major order).

        Args:
            x: (..., m).
            balanced: see `Router`.
        """
        x_tm = x.reshape(-1, x.shape[-1])
        routing = self.router(x_tm, balanced=balanced)
        shared = None if self.shared is None else partial(self.shared, x_tm)
        y_tm = self.routed(x_tm, routing.expert_ids, routing.gate, shared)
        return y_tm.view(x.shape), routing

    def routed(
        self,
        x_tm: Tensor,
        expert_ids: Tensor,
        gate: Tensor,
        plus: Callable[[], Tensor] | None = None,
    ) -> Tensor:
        """The routed experts' part of the output, (t, m), and what `plus` gives.

        Args:
            x_tm: (t, m).
            expert_ids, gate: (t,), or (t, k).
            plus: computed while tokens travel, where experts are spread over processes.
        """
        options: dict[str, Any] = {
            "activation": self.activation,
            "gated": self.gated,
            "fc1_bias": self.fc1_bias,
            "fc2_bias": self.fc2_bias,
            "gate": gate,
        }
        fc1, fc2 = self.fc1, self.fc2
        if isinstance(fc1, QuantizedStorage) and isinstance(fc2, QuantizedStorage):
            # only adapters allow training mode; without them a gradient is refused
            passes_gradients = self.training and torch.is_grad_enabled() and x_tm.requires_grad
            run = frozen_expert_mlp if passes_gradients else quantized_expert_mlp
            y_tm = run(x_tm, expert_ids, fc1.stored(), fc2.stored(), **options)
        else:
            assert isinstance(fc1, Tensor)
            assert isinstance(fc2, Tensor)
            if self.spread_experts is not None:
                return self.spread_experts(x_tm, expert_ids, fc1, fc2, **options, plus=plus)
            y_tm = expert_mlp(x_tm, expert_ids, fc1, fc2, **options)
        return y_tm if plus is None else y_tm + plus()
