"""The folder of a run: whether it may be used, where its run goes on, what lies in it."""

import dataclasses
import logging
from pathlib import Path

import torch

from blackmamba.data import ChatData, MixtureData, PreparedData, prepare, prepare_conversations
from blackmamba.errors import ConfigError, DataError
from blackmamba.ops.backend import chosen_backend
from blackmamba.ops.native import bfloat16
from blackmamba.train.checkpoints import Checkpoint, newest_checkpoint, remove_leftovers
from blackmamba.train.config import RunConfig, check_resumable
from blackmamba.train.metrics import METRICS_FILE
from blackmamba.train.parallel.ranks import Ranks

RECIPE, DATA, CHECKPOINTS, MODEL = "recipe.yaml", "data", "checkpoints", "model"
ADAPTER = "adapter"
_logger = logging.getLogger(__name__)


def pick_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("train.device='cuda': no usable GPU here; use 'auto' or 'cpu'")
    return torch.device(name)


def enter(out: Path, config: RunConfig, resume: bool, ranks: Ranks) -> Checkpoint | None:
    """See that the run may use the folder `out`; the checkpoint to go on from, if any.

    The first rank is through with it before the others begin, and alone writes and speaks.
    """
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out}: not a folder; a run needs one of its own")
    held = [name for name in (RECIPE, METRICS_FILE, CHECKPOINTS, MODEL) if (out / name).exists()]
    if held and not resume and ranks.is_first:
        raise ConfigError(
            f"{out}: holds a run already ({held[0]}); go on with it by --resume, "
            "or choose another --out"
        )
    if ranks.is_first:
        remove_leftovers(out / CHECKPOINTS)
    checkpoint = newest_checkpoint(out / CHECKPOINTS)
    if checkpoint is None:
        if resume and ranks.is_first:
            _logger.warning("%s: no checkpoint to resume from; beginning with step 1", out)
        return None
    resolved = with_dtype(config, checkpoint, torch.device("cpu"))
    check_resumable(checkpoint.config, resolved, (checkpoint.ranks, ranks.size))
    if checkpoint.counters.step > config.train.steps:
        raise ConfigError(
            f"train.steps={config.train.steps}: {checkpoint.folder} has more steps done already"
        )
    return checkpoint


def with_dtype(config: RunConfig, checkpoint: Checkpoint | None, device: torch.device) -> RunConfig:
    """The configuration with what it stands for in the place of "auto"."""
    train, begun = config.train, None if checkpoint is None else checkpoint.config.train
    if train.dtype == "auto":
        dtype = "bfloat16" if _multiplies_bfloat16(device) else "float32"
        train = dataclasses.replace(train, dtype=begun.dtype if begun else dtype)
    if train.weights == "auto":
        is_fast = device.type == "cuda" or chosen_backend("adamw") != "reference"
        masters = is_fast and train.dtype == "bfloat16"
        weights = "master" if masters and config.parallel.shard == "none" else "float32"
        train = dataclasses.replace(train, weights=begun.weights if begun else weights)
    if train.optimizer == "muon" and train.muon_dtype == "auto":
        dtype = "bfloat16" if _multiplies_bfloat16(device) else train.dtype
        train = dataclasses.replace(train, muon_dtype=begun.muon_dtype if begun else dtype)
    return dataclasses.replace(config, train=train)


def _multiplies_bfloat16(device: torch.device) -> bool:
    """Whether the device has instructions for bfloat16 that are faster than those for float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and bfloat16.is_faster_than_float32()


def open_data(
    out: Path, config: RunConfig, checkpoint: Checkpoint | None
) -> PreparedData | ChatData | MixtureData:
    """The run's data, prepared where it is not yet.

    Raises:
        DataError: it is missing, damaged, or not what the run began with.
    """
    folder = out / DATA
    make = prepare_conversations if config.train.chat else prepare
    if config.data.sources:
        data = MixtureData(config.data, folder)
    elif checkpoint is None:
        return make(config.data, folder)
    else:
        try:
            # the text itself may be gone by now
            data = (ChatData if config.train.chat else PreparedData).open(folder)
        except DataError:
            data = make(config.data, folder)
    if checkpoint is not None and data.fingerprint != checkpoint.data:
        raise DataError(f"{folder}: not the text that this run began with; begin a new run")
    return data
