"""Random weights to begin training from.

Source: Gu and Dao 2023 (arXiv 2312.00752), section 3.6 (A, dt), and the authors' code (embedding
N(0, 0.02); the last product of each part divided by the square root of the number of parts, as in
GPT-2). The initialisation that the released models were trained from is not public.
"""

import math
from typing import TYPE_CHECKING, assert_never

import torch
from torch import Tensor, nn

from blackmamba.model.attention import Attention
from blackmamba.model.layer import Layer
from blackmamba.model.mamba import Mamba
from blackmamba.model.mlp import MLP
from blackmamba.model.moe import MoE
from blackmamba.model.norm import LayerNorm, RMSNorm
from blackmamba.model.quantized import QuantizedStorage

if TYPE_CHECKING:
    from blackmamba.model.language_model import BlackMamba

_STD = 0.02  # of the embedding and of the router
_DT_MIN, _DT_MAX, _DT_FLOOR = 1e-3, 1e-1, 1e-4


@torch.no_grad()
def initialise(model: "BlackMamba") -> None:
    """Fill every parameter of `model` anew from torch's global generator."""
    parts = sum((s.mixer != "none") + (s.feed_forward != "none") for s in model.config.layer_specs)
    damping = 1 / math.sqrt(parts)
    for table in (model.embedding, model.head):
        if table is not None:
            nn.init.normal_(_plain(table.weight), std=_STD)
    if model.head_bias is not None:
        model.head_bias.zero_()
    for module in model.modules():
        match module:
            case Layer():
                _check_mixer(module)
            case Mamba():
                _mamba(module, damping)
            case Attention():
                for linear in (module.q_proj, module.k_proj, module.v_proj):
                    _linear(linear)
                _linear(module.out_proj, damping)
            case MLP():
                _linear(module.fc1)
                _linear(module.fc2, damping)
            case MoE():
                _moe(module, damping)
            case RMSNorm():
                module.weight.fill_(1)
            case LayerNorm():
                module.reset_parameters()
            case _:
                pass


def _check_mixer(layer: Layer) -> None:
    """Another kind of mixer would be left as its memory was: it belongs in `initialise`."""
    if layer.mixer is not None and not isinstance(layer.mixer, Mamba | Attention):
        assert_never(layer.mixer)


def _mamba(layer: Mamba, damping: float) -> None:
    _linear(layer.in_proj)
    _linear(layer.x_proj)
    _linear(layer.out_proj, damping)
    d_conv = layer.conv_weight.shape[1]
    _uniform(layer.conv_weight, d_conv)
    _uniform(layer.conv_bias, d_conv)
    _uniform(layer.dt_proj.weight, layer.dt_proj.in_features)  # keeps the variance of dt

    # softplus(dt_bias) is log-uniform in [_DT_MIN, _DT_MAX]: memories from 10 to 1,000 tokens long
    low, high = math.log(_DT_MIN), math.log(_DT_MAX)
    dt = torch.empty_like(layer.dt_bias).uniform_(low, high).exp_().clamp_(min=_DT_FLOOR)
    layer.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus

    rates = torch.arange(1, layer.A_log.shape[1] + 1, device=layer.A_log.device)
    layer.A_log.copy_(rates.to(layer.A_log.dtype).log().expand_as(layer.A_log))  # S4D-real
    layer.D.fill_(1)


def _moe(layer: MoE, damping: float) -> None:
    nn.init.normal_(layer.router.weight, std=_STD)
    layer.router.bias.zero_()
    for buffer in layer.router.buffers():  # no load yet, and no bias against it
        buffer.zero_()
    fc1, fc2 = _plain(layer.fc1), _plain(layer.fc2)
    _uniform(fc1, fc1.shape[2])
    _uniform(fc2, fc2.shape[2])
    fc2.mul_(damping)
    for bias in (layer.fc1_bias, layer.fc2_bias):
        if bias is not None:
            bias.zero_()


def _plain(weight: Tensor | QuantizedStorage) -> Tensor:
    assert isinstance(weight, Tensor)  # a model is initialised before it is quantised
    return weight


def _linear(linear: nn.Linear, scale: float = 1.0) -> None:
    _uniform(linear.weight, linear.in_features)
    linear.weight.mul_(scale)
    if linear.bias is not None:  # pyright: ignore[reportUnnecessaryComparison] # it may be None
        linear.bias.zero_()


def _uniform(weight: Tensor, fan_in: int) -> None:
    """U(-1, 1) / sqrt(fan_in), torch's own default for linear layers."""
    bound = 1 / math.sqrt(fan_in)
    weight.uniform_(-bound, bound)
