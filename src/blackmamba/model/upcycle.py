"""A trained dense Mamba as the beginning of a BlackMamba.

Its layers are copied, and layers of experts put between them. Fresh experts give exactly 0 at first
(their second product is 0), so the new model computes what the old one did. Experts that begin as
copies of a trained MLP do not: that MLP was of another network.

Source: Komatsuzaki et al. 2022 (arXiv 2212.05055): every expert begins as a copy of one MLP, the
router at random. Nakamura et al. 2025 (arXiv 2502.19261): exact copies are slow to become
different; they draw part of each anew, we add noise to all of it.
"""

import dataclasses
import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from blackmamba.config import ModelConfig
from blackmamba.errors import ConfigError
from blackmamba.model.mlp import MLP
from blackmamba.model.moe import MoE

if TYPE_CHECKING:
    from blackmamba.model.language_model import BlackMamba

_GATE = 0.5  # of the expert that a fresh router chooses: sigmoid of a logit near 0


@torch.no_grad()
def upcycle(
    dense: "BlackMamba",
    *,
    n_experts: int = 8,
    d_expert: int = 0,
    every: int = 1,
    mlps: "BlackMamba | None" = None,
    noise: float = 0.0,
    seed: int = 0,
) -> "BlackMamba":
    """A BlackMamba that has the layers of `dense` and, after each, a layer of experts.

    Args:
        dense: a model of "mamba" layers alone; left as it is.
        n_experts: of each new layer.
        d_expert: width of an expert; 0: that of the MLPs, or else 8/3 of d_model, rounded up to a
            multiple of 64.
        every: Mamba layers before each layer of experts; divides their number.
        mlps: a model with "mlp" layers of the same d_model, whose weights the experts begin with:
            the first new layers those of its first, and so on. None: fresh experts.
        noise: what is added to copied weights: normal, of so many times the standard deviation of
            their matrix.
        seed: of router, fresh experts and noise.
    Returns:
        The new model on the CPU, in evaluation mode, its parameters in the dtype of `dense`.
    Raises:
        ConfigError: an argument is out of range, or the models do not fit together.
    """
    config = _config(dense.config, n_experts, d_expert, every, mlps, noise)
    dtype = dense.embedding.weight.dtype
    assert isinstance(dtype, torch.dtype)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = type(dense)(config, dtype=dtype, compute_dtype=dense.compute_dtype)
        experts = [m for m in model.modules() if isinstance(m, MoE)]
        donors = [] if mlps is None else [m for m in mlps.modules() if isinstance(m, MLP)]
        for i, layer in enumerate(experts):
            if donors:
                _copy(donors[i * len(donors) // len(experts)], layer, noise)
            else:
                _plain(layer.fc2).zero_()
                if layer.fc2_bias is not None:
                    layer.fc2_bias.zero_()
    own = dict(model.named_parameters())
    for name, parameter in dense.named_parameters():
        own[_moved(name, every)].copy_(parameter)
    return model.eval()


def _config(
    dense: ModelConfig,
    n_experts: int,
    d_expert: int,
    every: int,
    mlps: "BlackMamba | None",
    noise: float,
) -> ModelConfig:
    if set(dense.layers) != {"mamba"}:
        other = next(layer for layer in dense.layers if layer != "mamba")
        raise ConfigError(f"the model to upcycle has a layer {other!r}: must be of mamba layers")
    if n_experts < 2:
        raise ConfigError(f"n_experts={n_experts}: must be at least 2")
    if every < 1 or dense.n_layers % every:
        raise ConfigError(f"every={every}: must divide the number of layers, {dense.n_layers}")
    if not 0 <= noise < math.inf:
        raise ConfigError(f"noise={noise}: must be finite and at least 0")
    if d_expert < 0:
        raise ConfigError(f"d_expert={d_expert}: must be at least 1, or 0 for the usual width")
    width = -(-8 * dense.d_model // (3 * 64)) * 64
    changed = dense
    if mlps is not None:
        other = mlps.config
        width = other.d_mlp
        if not any(spec.feed_forward == "mlp" for spec in other.layer_specs):
            raise ConfigError("the model to take experts from has no mlp layers")
        for name in ("d_model", "linear_bias"):
            ours, theirs = getattr(dense, name), getattr(other, name)
            if ours != theirs:
                raise ConfigError(f"{name}={ours!r}: the model to take experts from has {theirs!r}")
        if d_expert not in (0, width):
            raise ConfigError(f"d_expert={d_expert}: the MLPs to copy have {width}")
        changed = dataclasses.replace(dense, activation=other.activation, gated=other.gated)
    elif noise:
        raise ConfigError(f"noise={noise}: there is nothing to add it to without MLPs to copy")
    return dataclasses.replace(
        changed,
        layers=(*("mamba",) * every, "moe") * (dense.n_layers // every),
        n_experts=n_experts,
        d_expert=d_expert or width,
    )


def _copy(donor: MLP, layer: MoE, noise: float) -> None:
    """Give every expert the donor's weights, so that with the gate its output is the donor's."""
    pairs = [
        (layer.fc1, donor.fc1.weight, 1.0),
        (layer.fc2, donor.fc2.weight, 1 / _GATE),
        (layer.fc1_bias, donor.fc1.bias, 1.0),
        (layer.fc2_bias, donor.fc2.bias, 1 / _GATE),
    ]
    for stacked, weight, scale in pairs:
        if stacked is None:
            continue
        into = _plain(stacked)
        into.copy_(scale * weight)
        if noise and weight.dim() == 2:
            drawn = torch.randn(into.shape, dtype=torch.float32) * (noise * scale * weight.std())
            into.add_(drawn.to(into.dtype))


def _plain(weight: Tensor | nn.Module) -> Tensor:
    assert isinstance(weight, Tensor)  # the model was just built
    return weight


def _moved(name: str, every: int) -> str:
    """The new name of a parameter: layers have moved up to make room."""
    if not name.startswith("layers."):
        return name
    _, index, rest = name.split(".", 2)
    return f"layers.{int(index) + int(index) // every}.{rest}"
