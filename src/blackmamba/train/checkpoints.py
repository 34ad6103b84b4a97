"""Checkpoints of a run: all that it needs to go on as if it had never stopped.

RUN/checkpoints/step-00000123/ of one process is a model folder that `blackmamba.load` reads, and
beside it

    optimizer.safetensors   what the optimizer remembers, as <parameter>/<quantity>
    trainer.json            counters, the run's configuration, the data's fingerprint, version
    checksums.json          SHA-256 of every other file

Of a run on many ranks it has, in the place of whole tensors, shard-*.safetensors: what each rank
held. Either is read by any number of ranks.

Of a run that trains adapters it is an adapter folder instead, of the model in RUN/base/.

The folder appears under its name when it is whole and on disk. Which windows come next follows from
the step alone, and nothing draws random numbers once the weights are there. staging.py writes it,
restoring.py reads it.
"""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from blackmamba.config import from_mapping
from blackmamba.errors import CheckpointError, ConfigError
from blackmamba.files import digest
from blackmamba.model import BlackMamba
from blackmamba.model.lora import adaptation, adapter_name
from blackmamba.train.config import RunConfig
from blackmamba.train.parallel.ranks import Ranks

FORMAT = 2  # 1 had no checksums
OPTIMIZER, TRAINER = "optimizer.safetensors", "trainer.json"
CHECKSUMS = "checksums.json"


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
    ranks: int = 1
    """How many wrote it."""
    is_spread: bool = False
    """Its tensors are in pieces."""
    has_checksums: bool = True


def check_files(checkpoint: Checkpoint, ranks: Ranks) -> None:
    """See that every file is as it was written; ranks share the work and all call it.

    Raises:
        CheckpointError: names the file that is damaged or missing.
        PeerError: another rank found one.
    """

    def check() -> None:
        sums = _read_sums(checkpoint.folder)
        for name in sorted(sums)[ranks.rank :: ranks.size]:
            _check_file(checkpoint.folder / name, sums)

    if checkpoint.has_checksums:
        ranks.together(check)


def _read_sums(folder: Path) -> dict[str, str]:
    path = folder / CHECKSUMS
    try:
        sums: Any = json.loads(path.read_text(encoding="utf-8"))
        return {str(name): str(value) for name, value in sums.items()}
    except (OSError, ValueError, AttributeError) as error:
        raise damaged(path, error) from None


def _check_file(path: Path, sums: dict[str, str]) -> None:
    try:
        found = digest(path)
    except OSError as error:
        raise damaged(path, error.strerror or error) from None
    if found != sums.get(path.name):
        raise damaged(path, "its checksum is not the one that was written")


def newest_checkpoint(root: Path, every: int = 1) -> Checkpoint | None:
    """The checkpoint to resume from; None if there is none.

    Args:
        root: of all checkpoints.
        every: only those after a multiple of so many steps.
    Raises:
        CheckpointError: its trainer.json is damaged or of another format.
    """
    folders = [folder for folder in folders_of(root) if step_of(folder) % every == 0]
    if not folders:
        return None
    path = folders[-1] / TRAINER
    try:
        has_checksums = (folders[-1] / CHECKSUMS).exists()
        if has_checksums:
            _check_file(path, _read_sums(folders[-1]))
        trainer: Any = json.loads(path.read_text(encoding="utf-8"))
        if trainer["format"] not in (1, FORMAT):
            raise CheckpointError(
                f"{path}: format {trainer['format']!r}; this version reads {FORMAT}"
            )
        if trainer["format"] == FORMAT and not has_checksums:
            raise damaged(folders[-1] / CHECKSUMS, "it is missing")
        return Checkpoint(
            folder=folders[-1],
            counters=from_mapping(Counters, trainer["counters"], "counters"),
            config=from_mapping(RunConfig, trainer["config"]),
            data=str(trainer["data"]),
            ranks=int(trainer.get("ranks", 1)),
            is_spread=bool(trainer.get("is_spread", False)),
            has_checksums=has_checksums,
        )
    except (OSError, ValueError, KeyError, TypeError, ConfigError) as error:
        raise damaged(path, error) from None


def saved_parameters(holder: nn.Module, model: BlackMamba) -> dict[str, str]:
    """By name in the model, the name in a checkpoint: all of them, or the adapters alone."""
    named = holder.named_parameters()
    if adaptation(model) is None:
        return {name: name for name, _ in named}
    return {name: adapter_name(name) for name, p in named if p.requires_grad}


def saved_buffers(model: BlackMamba) -> dict[str, Tensor]:
    """Those that a model folder holds, too; an adapter has none."""
    if adaptation(model) is not None:
        return {}
    saved = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in saved}


def remove_leftovers(root: Path) -> None:
    """Remove what a killed run left half-written or half-removed."""
    for leftover in root.glob(".step-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def remove_later(root: Path, step: int) -> None:
    """Remove the checkpoints after that of `step`, where a run goes another way from there."""
    for folder in folders_of(root):
        if step_of(folder) > step:
            remove(folder)


def folders_of(root: Path) -> list[Path]:
    """Of all checkpoints, oldest first."""
    return sorted(p for p in root.glob("step-*") if p.name[5:].isdecimal())


def folder_of(root: Path, step: int) -> Path:
    """Where the checkpoint of a step lies among all of a run."""
    return root / f"step-{step:08d}"


def step_of(folder: Path) -> int:
    return int(folder.name[5:])


def remove(folder: Path) -> None:
    """Whole or not at all, as far as anyone can see."""
    leaving = folder.with_name(f".{folder.name}.old")
    folder.rename(leaving)
    shutil.rmtree(leaving, ignore_errors=True)


def damaged(path: Path, reason: object) -> CheckpointError:
    return CheckpointError(
        f"{path}: damaged checkpoint ({reason}); remove its folder to resume from the one before"
    )
