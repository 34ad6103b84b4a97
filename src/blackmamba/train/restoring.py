"""Reads checkpoints, of any number of ranks by any number."""

from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from blackmamba.checkpoint import load
from blackmamba.checkpoint.adapter import fill_adapters
from blackmamba.errors import CheckpointError, ConfigError
from blackmamba.model import BlackMamba
from blackmamba.model.lora import adaptation
from blackmamba.train.average import WeightAverage
from blackmamba.train.checkpoints import (
    OPTIMIZER,
    Checkpoint,
    check_files,
    damaged,
    saved_buffers,
    saved_parameters,
)
from blackmamba.train.optimizer import quantities, restore_optimizer
from blackmamba.train.parallel.ranks import Ranks

if TYPE_CHECKING:
    from blackmamba.train.parallel.spread import Spread


def restore(
    checkpoint: Checkpoint,
    model: BlackMamba,
    optimizer: torch.optim.Optimizer,
    average: WeightAverage | None = None,
    spread: "Spread | None" = None,
) -> None:
    """Give `model`, `optimizer` and `average` the values that they had.

    The checkpoint may be of any number of ranks. With the model `spread` over ranks, all of them
    read together.

    Raises:
        CheckpointError: a file is missing, damaged, or does not fit the model.
        PeerError: another rank found that.
    """
    check_files(checkpoint, Ranks() if spread is None else spread.ranks)
    if spread is not None or checkpoint.is_spread:
        _read_pieces(checkpoint, model, optimizer, average, spread)
        return
    try:
        if adaptation(model) is None:
            saved = load(checkpoint.folder)
            if saved.config != model.config:
                raise ConfigError("its config.json is that of another model")
            model.load_state_dict(saved.state_dict())
        else:
            fill_adapters(model, checkpoint.folder)
    except (CheckpointError, ConfigError) as error:
        raise damaged(checkpoint.folder, error) from None
    path = checkpoint.folder / OPTIMIZER
    try:
        restore_optimizer(model, optimizer, load_file(path), average)
    except (OSError, ValueError, SafetensorError) as error:
        raise damaged(path, error) from None


def _read_pieces(
    checkpoint: Checkpoint,
    model: BlackMamba,
    optimizer: torch.optim.Optimizer,
    average: WeightAverage | None,
    spread: "Spread | None",
) -> None:
    """Read what this rank holds, out of whole tensors or of the pieces of other ranks."""
    from blackmamba.train.parallel.checkpoint import names_in, read_together

    holder = model if spread is None else spread.shards
    saved = saved_parameters(holder, model)
    parameters = {n: p for n, p in holder.named_parameters() if n in saved}
    # Where they are in the host's memory, they are filled in place.
    weights = {n: p.detach().cpu() for n, p in parameters.items()}
    buffers = {n: b.cpu() for n, b in saved_buffers(model).items()}
    try:
        remembered: dict[str, Tensor] = {}
        if any("/" in name for name in names_in(checkpoint.folder)):  # there was a step
            remembered = {
                f"{name}/{quantity}": torch.zeros(() if quantity == "step" else p.shape)
                for name, p in parameters.items()
                if p.requires_grad
                for quantity in quantities(optimizer, p)
            }
            for name, value in {} if average is None else average.tensors.items():
                remembered[f"{name}/average"] = torch.zeros(value.shape)
        wanted = weights | remembered
        if spread is not None:
            wanted = {
                key: v if key.endswith("/step") else spread.shards.spread(key.split("/")[0], v)
                for key, v in wanted.items()
            }
        group = None if spread is None else spread.group
        wanted = {saved.get(key, key): value for key, value in wanted.items()}
        read_together(wanted | buffers, checkpoint.folder, group)
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(weights[name])
            for name, buffer in buffers.items():
                model.get_buffer(name).copy_(buffer)
        restore_optimizer(holder, optimizer, remembered, average)
    except (CheckpointError, ValueError) as error:
        raise damaged(checkpoint.folder, error) from None
