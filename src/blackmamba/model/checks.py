"""What a model refuses to read: each is one line that names the value and what would be right."""

import torch
from torch import Tensor

from blackmamba.config import ModelConfig
from blackmamba.errors import InputError
from blackmamba.model.state import State


def check_ids(config: ModelConfig, input_ids: Tensor) -> None:
    if input_ids.dim() != 2 or input_ids.dtype != torch.int64:
        raise InputError(
            f"input_ids of shape {tuple(input_ids.shape)}, {input_ids.dtype}: "
            "must be (batch, length), torch.int64"
        )
    if input_ids.numel() == 0:
        raise InputError(
            f"input_ids of shape {tuple(input_ids.shape)}: needs at least one row and one token"
        )
    check_range(config, "input_ids", input_ids)


def check_range(config: ModelConfig, name: str, ids: Tensor) -> None:
    if ids.device.type != "cpu" or torch.compiler.is_compiling():
        return  # looking would wait for the device, which has a check of its own
    low, high = ids.aminmax()
    if low < 0 or high >= config.vocab_size:
        bad = int(low if low < 0 else high)
        raise InputError(f"{name} holds {bad}: must be 0 .. {config.vocab_size - 1}")


def check_state(config: ModelConfig, state: State | None, batch_size: int) -> None:
    if state is None:
        return
    if len(state.layers) != config.n_layers:
        raise InputError(f"state of {len(state.layers)} layers: this model has {config.n_layers}")
    if state.batch_size != batch_size:
        raise InputError(f"state of {state.batch_size} rows: the input has {batch_size}")
