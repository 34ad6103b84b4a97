"""AdamW or Muon, with weight decay where it belongs: on the matrices that are multiplied with.

Source: Loshchilov and Hutter 2019 (arXiv 1711.05101). Which parameters are not decayed: A_log and D
as in Gu and Dao's and the BlackMamba authors' code (a decayed A_log would pull every memory to
the same length), norms and biases by custom.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from blackmamba.ops.backend import available_backends, chosen_backend
from blackmamba.train.average import WeightAverage
from blackmamba.train.config import TrainConfig
from blackmamba.train.mixed import MixedAdamW
from blackmamba.train.muon import Muon, is_muons


def decays(name: str) -> bool:
    """Whether the parameter of this name has weight decay.

    Products, experts, router, convolution and embedding have; norms, biases, A_log and D not.
    """
    *path, last = name.split(".")
    is_norm = any(part.endswith("norm") for part in path)
    return not (is_norm or last.endswith("bias") or last in ("A_log", "D"))


def build_optimizer(
    model: nn.Module, config: TrainConfig, masters: Mapping[str, Tensor] | None = None
) -> torch.optim.AdamW | MixedAdamW:
    """What `config.optimizer` names, in groups with decay and without.

    Each step sets the groups' learning rates.

    Ours is one pass over memory, clipping included, on a GPU and, by native kernels, on a CPU.
    Without those, torch's fused AdamW takes its place for float32 weights.

    Args:
        model: whose parameters to train, but for those that require no gradient.
        config: says how, and whether masters are kept.
        masters: float32 copies of the narrow parameters, by name, to begin with.
    """
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    betas = config.beta1, config.beta2
    kept = {} if masters is None or config.weights == "stochastic" else masters
    if config.optimizer == "muon":
        own = {n for n, p in named if is_muons(n, p)}
        others = [(n, p) for n, p in named if n not in own]
        narrow = config.dtype if config.muon_dtype == "auto" else config.muon_dtype
        ratio = {"lr_ratio": config.adamw_lr_ratio, "is_muons": False}
        matrices = {
            "params": [p for n, p in named if n in own],
            "weight_decay": config.weight_decay,
            "is_muons": True,
        }
        return Muon(
            [matrices, *(group | ratio for group in _groups(others, config.weight_decay))],
            config.lr,
            betas,
            config.adam_eps,
            _by_parameter(named, kept),
            momentum=config.muon_momentum,
            scale=config.muon_scale,
            dtype=torch.bfloat16 if narrow == "bfloat16" else torch.float32,
        )
    groups = _groups(named, config.weight_decay)
    is_plain = named[0][1].device.type == "cpu" and all(p.dtype == torch.float32 for _, p in named)
    if is_plain and not _is_native():
        return torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.adam_eps, fused=True)
    return MixedAdamW(groups, config.lr, betas, config.adam_eps, _by_parameter(named, kept))


def _is_native() -> bool:
    """Whether a CPU's parameters are updated by the native kernel; there may be a GPU too."""
    chosen = chosen_backend("adamw")
    return chosen == "native" or (chosen == "triton" and "native" in available_backends("adamw"))


def _groups(named: Sequence[tuple[str, nn.Parameter]], decay: float) -> list[dict[str, Any]]:
    return [
        {"params": [p for n, p in named if decays(n)], "weight_decay": decay},
        {"params": [p for n, p in named if not decays(n)], "weight_decay": 0.0},
    ]


def _by_parameter(
    named: Sequence[tuple[str, nn.Parameter]], masters: Mapping[str, Tensor]
) -> dict[nn.Parameter, Tensor]:
    return {p: masters[n].to(p.device) for n, p in named if n in masters}


def optimizer_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer, average: WeightAverage | None = None
) -> dict[str, Tensor]:
    """All that the optimizer remembers, by "<parameter>/<quantity>"; nothing before a step.

    With an average of the weights, that as "<parameter>/average".
    """
    tensors = {
        f"{name}/{quantity}": value.clone() if quantity == "step" else value  # it may be shared
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
        for quantity, value in optimizer.state[parameter].items()
    }
    if average is not None:
        tensors |= {f"{name}/average": value for name, value in average.tensors.items()}
    return tensors


def restore_optimizer(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    tensors: dict[str, Tensor],
    average: WeightAverage | None = None,
) -> None:
    """Make the optimizer, and the average, remember what `optimizer_tensors` gave.

    Raises:
        ValueError: the tensors are those of another model.
    """
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    averages = {} if average is None else average.tensors
    shapes = {
        f"{name}/{quantity}": torch.Size() if quantity == "step" else p.shape
        for name, p in parameters.items()
        for quantity in quantities(optimizer, p)
    } | {f"{name}/average": value.shape for name, value in averages.items()}
    wrong = {k for k, v in tensors.items() if shapes.get(k) != v.shape}
    if tensors:
        wrong |= shapes.keys() - tensors.keys()
    if wrong:
        raise ValueError(f"{min(wrong)} and {len(wrong) - 1} more do not fit the model")
    for key, value in tensors.items():
        name, quantity = key.split("/")
        if quantity == "average":
            averages[name].copy_(value)
            continue
        parameter = parameters[name]
        optimizer.state[parameter][quantity] = value.to(parameter.device, copy=True)


def quantities(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> tuple[str, ...]:
    """What the optimizer remembers of a parameter, once it has stepped."""
    if isinstance(optimizer, MixedAdamW):
        return optimizer.quantities[parameter]
    return ("exp_avg", "exp_avg_sq", "step")
