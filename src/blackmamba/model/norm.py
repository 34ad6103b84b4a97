"""Norms. Their parameters and arithmetic are float32 or wider, whatever the model's dtype."""

import torch
from torch import Tensor, nn

from blackmamba.config import ModelConfig
from blackmamba.ops import add_rms_norm, rms_norm


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight.

    Source: Zhang and Sennrich 2019 (arXiv 1910.07467), eq. 4.
    """

    def __init__(self, width: int, eps: float, *, device: torch.device | None, dtype: torch.dtype):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width, device=device, dtype=dtype))

    def forward(self, x: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
        """(..., m) to the same shape, in out_dtype; None: x's."""
        return rms_norm(x, self.weight, self.eps, out_dtype=out_dtype)

    def add(
        self, x: Tensor, update: Tensor | None, out_dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor]:
        """x + update in x's dtype (x itself if there is no update), and its norm in out_dtype."""
        if update is None:
            return x, self(x, out_dtype)
        return add_rms_norm(x, update, self.weight, self.eps, out_dtype=out_dtype)


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm that works in the dtype of its parameters and gives back the input's."""

    def forward(self, input: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
        """(..., m) to the same shape, in out_dtype; None: the input's."""
        return super().forward(input.to(self.weight.dtype)).to(out_dtype or input.dtype)

    def add(
        self, x: Tensor, update: Tensor | None, out_dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor]:
        """x + update in x's dtype (x itself if there is no update), and its norm in out_dtype."""
        total = x if update is None else (x + update).to(x.dtype)
        return total, self(total, out_dtype)


def final_norm(
    config: ModelConfig, *, device: torch.device | None, dtype: torch.dtype
) -> RMSNorm | LayerNorm:
    """The norm before the head. The released models have a LayerNorm with bias here."""
    if config.final_norm == "rms_norm":
        return RMSNorm(config.d_model, config.norm_eps, device=device, dtype=dtype)
    return LayerNorm(config.d_model, config.norm_eps, device=device, dtype=dtype)
