"""AdamW, with weight decay where it belongs: on the matrices that are multiplied with.

Source: Loshchilov and Hutter 2019 (arXiv 1711.05101). Which parameters are not decayed: A_log and D
as in Gu and Dao's and the BlackMamba authors' code (a decayed A_log would pull every memory to
the same length), norms and biases by custom.
"""

import torch
from torch import Tensor, nn

from blackmamba.train.config import TrainConfig


def decays(name: str) -> bool:
    """Whether the parameter of this name has weight decay.

    Products, experts, router, convolution and embedding have; norms, biases, A_log and D not.
    """
    *path, last = name.split(".")
    is_norm = any(part.endswith("norm") for part in path)
    return not (is_norm or last.endswith("bias") or last in ("A_log", "D"))


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW in two groups, with decay and without; each step sets its learning rate.

    The fused form is one pass over memory, on CPU and GPU, and gives the same bits in every run.
    """
    named = list(model.named_parameters())
    groups = [
        {"params": [p for n, p in named if decays(n)], "weight_decay": config.weight_decay},
        {"params": [p for n, p in named if not decays(n)], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups,
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.adam_eps,
        fused=True,
    )


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """All that the optimizer remembers, by "<parameter>/<quantity>"; nothing before a step."""
    return {
        f"{name}/{quantity}": value
        for name, parameter in model.named_parameters()
        for quantity, value in optimizer.state[parameter].items()
    }


def restore_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]
) -> None:
    """Make the optimizer remember what `optimizer_tensors` gave.

    Raises:
        ValueError: the tensors are those of another model.
    """
    parameters = dict(model.named_parameters())
    shapes = {f"{n}/{q}": p.shape for n, p in parameters.items() for q in ("exp_avg", "exp_avg_sq")}
    shapes |= {f"{name}/step": torch.Size() for name in parameters}
    wrong = {k for k, v in tensors.items() if shapes.get(k) != v.shape}
    if tensors:
        wrong |= shapes.keys() - tensors.keys()
    if wrong:
        raise ValueError(f"{min(wrong)} and {len(wrong) - 1} more do not fit the model")
    for key, value in tensors.items():
        name, quantity = key.split("/")
        parameter = parameters[name]
        optimizer.state[parameter][quantity] = value.to(parameter.device, copy=True)
