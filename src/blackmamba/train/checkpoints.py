"""Checkpoints of a run: all that it needs to go on as if it had never stopped.

RUN/checkpoints/step-00000123/ is a model folder that `blackmamba.load` reads, and beside it

    optimizer.safetensors   what the optimizer remembers, as <parameter>/<quantity>
    trainer.json            counters, the run's configuration, the data's fingerprint, version

Of a run that trains adapters it is an adapter folder instead, of the model in RUN/base/.

The folder appears under its name when it is whole and on disk. Which windows come next follows from
the step alone, and nothing draws random numbers once the weights are there.
"""

import dataclasses
import json
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from blackmamba.checkpoint import load, save, save_adapter
from blackmamba.checkpoint.adapter import fill_adapters
from blackmamba.config import from_mapping, to_mapping
from blackmamba.data import Tokenizer
from blackmamba.errors import CheckpointError, ConfigError
from blackmamba.files import atomic_folder, settle
from blackmamba.model import BlackMamba
from blackmamba.model.lora import adaptation
from blackmamba.train.average import WeightAverage
from blackmamba.train.config import RunConfig
from blackmamba.train.optimizer import optimizer_tensors, restore_optimizer
from blackmamba.train.origin import origin

FORMAT = 1
_OPTIMIZER, _TRAINER = "optimizer.safetensors", "trainer.json"


@dataclasses.dataclass(kw_only=True, slots=True)
class Counters:
    """How far a run is. Changed in place as it goes on."""

    step: int = 0
    """Steps that are done, the skipped ones included."""
    tokens: int = 0
    """Read so far."""
    bad_steps: int = 0
    """Steps skipped because loss or gradient was not finite."""
    bad_in_a_row: int = 0
    """Skipped just now, one after another, for any reason."""
    seconds: float = 0.0
    """Spent on training, validation and checkpoints, over all resumes."""

    skipped_batches: int = 0
    """The next step reads batch `step + skipped_batches` of the sampler: how many roll-backs left
    out."""
    spikes: int = 0
    """Steps skipped because loss or gradient was an outlier."""
    rollbacks: int = 0
    recent_losses: tuple[float, ...] = ()
    """What outliers are told from, oldest first; see `SpikeGuard`."""
    recent_norms: tuple[float, ...] = ()

    best_step: int = 0
    """After which the validation was best; 0: there was none yet."""
    best_nats_per_token: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What trainer.json says, and the folder that it lies in."""

    folder: Path
    counters: Counters
    config: RunConfig
    data: str
    """Fingerprint of the prepared data."""


def save_checkpoint(
    root: Path,
    model: BlackMamba,
    tokenizer: Tokenizer,
    optimizer: torch.optim.Optimizer,
    *,
    counters: Counters,
    config: RunConfig,
    data: str,
    keep: int,
    keep_also: Collection[int] = (),
    average: WeightAverage | None = None,
) -> Path:
    """Write the checkpoint of this step; remove all but the last `keep` and those of `keep_also`.

    Raises:
        CheckpointError: it cannot be written (a full disk); the older ones are whole.
    """
    folder = root / f"step-{counters.step:08d}"
    trainer = {
        "format": FORMAT,
        **origin(),
        "counters": to_mapping(counters),
        "data": data,
        "config": to_mapping(config),
    }
    try:
        with atomic_folder(folder) as temporary:
            if adaptation(model) is None:
                save(model, temporary, tokenizer=tokenizer)
            else:
                save_adapter(model, temporary)
            save_file(optimizer_tensors(model, optimizer, average), temporary / _OPTIMIZER)
            settle(temporary / _OPTIMIZER)
            text = json.dumps(trainer, indent=2, allow_nan=False) + "\n"
            (temporary / _TRAINER).write_text(text, encoding="utf-8")
    except (OSError, SafetensorError, CheckpointError) as error:
        raise CheckpointError(
            f"{folder}: the checkpoint cannot be written ({error}); older ones are as they were"
        ) from None
    for old in _folders(root)[:-keep]:
        if _step_of(old) not in keep_also:
            _remove(old)
    return folder


def newest_checkpoint(root: Path, every: int = 1) -> Checkpoint | None:
    """The checkpoint to resume from; None if there is none.

    Args:
        root: of all checkpoints.
        every: only those after a multiple of so many steps.
    Raises:
        CheckpointError: its trainer.json is damaged or of another format.
    """
    folders = [folder for folder in _folders(root) if _step_of(folder) % every == 0]
    if not folders:
        return None
    path = folders[-1] / _TRAINER
    try:
        trainer: Any = json.loads(path.read_text(encoding="utf-8"))
        if trainer["format"] != FORMAT:
            raise CheckpointError(
                f"{path}: format {trainer['format']!r}; this version reads {FORMAT}"
            )
        return Checkpoint(
            folder=folders[-1],
            counters=from_mapping(Counters, trainer["counters"], "counters"),
            config=from_mapping(RunConfig, trainer["config"]),
            data=str(trainer["data"]),
        )
    except (OSError, ValueError, KeyError, TypeError, ConfigError) as error:
        raise _damaged(path, error) from None


def restore(
    checkpoint: Checkpoint,
    model: BlackMamba,
    optimizer: torch.optim.Optimizer,
    average: WeightAverage | None = None,
) -> None:
    """Give `model`, `optimizer` and `average` the values that they had.

    Raises:
        CheckpointError: a file is missing, damaged, or does not fit the model.
    """
    try:
        if adaptation(model) is None:
            saved = load(checkpoint.folder)
            if saved.config != model.config:
                raise ConfigError("its config.json is that of another model")
            model.load_state_dict(saved.state_dict())
        else:
            fill_adapters(model, checkpoint.folder)
    except (CheckpointError, ConfigError) as error:
        raise _damaged(checkpoint.folder, error) from None
    path = checkpoint.folder / _OPTIMIZER
    try:
        restore_optimizer(model, optimizer, load_file(path), average)
    except (OSError, ValueError, SafetensorError) as error:
        raise _damaged(path, error) from None


def remove_leftovers(root: Path) -> None:
    """Remove what a killed run left half-written or half-removed."""
    for leftover in root.glob(".step-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _folders(root: Path) -> list[Path]:
    """Of all checkpoints, oldest first."""
    return sorted(p for p in root.glob("step-*") if p.name[5:].isdecimal())


def _step_of(folder: Path) -> int:
    return int(folder.name[5:])


def _remove(folder: Path) -> None:
    """Whole or not at all, as far as anyone can see."""
    leaving = folder.with_name(f".{folder.name}.old")
    folder.rename(leaving)
    shutil.rmtree(leaving, ignore_errors=True)


def _damaged(path: Path, reason: object) -> CheckpointError:
    return CheckpointError(
        f"{path}: damaged checkpoint ({reason}); remove its folder to resume from the one before"
    )
