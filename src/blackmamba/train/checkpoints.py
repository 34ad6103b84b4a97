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
the step alone, and nothing draws random numbers once the weights are there.
"""

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Collection, Generator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from blackmamba.checkpoint import load, save
from blackmamba.checkpoint.adapter import fill_adapters, write_adapter
from blackmamba.config import from_mapping, to_mapping
from blackmamba.data import Tokenizer
from blackmamba.errors import CheckpointError, ConfigError, PeerError
from blackmamba.files import atomic_folder, digest, settle, sync
from blackmamba.model import BlackMamba
from blackmamba.model.lora import adaptation, adapter_name, adapter_tensors
from blackmamba.train.average import WeightAverage
from blackmamba.train.config import RunConfig
from blackmamba.train.optimizer import optimizer_tensors, quantities, restore_optimizer
from blackmamba.train.origin import origin
from blackmamba.train.parallel.ranks import Ranks

if TYPE_CHECKING:
    from blackmamba.train.parallel.spread import Spread

FORMAT = 2  # 1 had no checksums
_OPTIMIZER, _TRAINER = "optimizer.safetensors", "trainer.json"
_CHECKSUMS = "checksums.json"


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


def staged(
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
    spread: "Spread | None" = None,
    copied: bool = False,
) -> Callable[[], Path]:
    """What writes the checkpoint of this step, and removes all but the last `keep` and those of
    `keep_also`; it gives the checkpoint's folder.

    With the model `spread` over ranks, all of them call this together, and what it gives.

    Args:
        copied: it can be called from another thread while the training goes on: what it writes is
            copied into the host's memory.
    Raises:
        CheckpointError: it cannot be written (a full disk); the older ones are whole.
        PeerError: the same, on ranks but the first.
    """
    folder = root / f"step-{counters.step:08d}"
    trainer = {
        "format": FORMAT,
        **origin(),
        "counters": to_mapping(counters),
        "data": data,
        "ranks": 1 if spread is None else spread.ranks.size,
        "is_spread": spread is not None,
        "config": to_mapping(config),
    }
    text = json.dumps(trainer, indent=2, allow_nan=False) + "\n"
    if spread is not None:
        with _told(folder, spread):
            spread.ranks.first(partial(_begin, _temporary(folder)))
        pieces = _pieces(spread, optimizer, average, copied)
        write = partial(_write_pieces, folder, spread, pieces, text)
    else:
        remembered = optimizer_tensors(model, optimizer, average)
        adapted = adaptation(model)
        if copied:
            remembered = {key: _copy(value) for key, value in remembered.items()}
        if adapted is not None:
            tensors = adapter_tensors(model)
            if copied:
                tensors = {name: _copy(value) for name, value in tensors.items()}
            save_weights = partial(write_adapter, adapted, tensors, tokenizer=tokenizer)
        else:
            save_weights = partial(save, _twin(model) if copied else model, tokenizer=tokenizer)
        write = partial(_write_whole, folder, save_weights, remembered, text)

    def write_and_tidy() -> Path:
        with _told(folder, spread):
            write()
        if spread is None or spread.ranks.is_first:
            for old in _folders(root)[:-keep]:
                if _step_of(old) not in keep_also:
                    _remove(old)
        return folder

    return write_and_tidy


@contextlib.contextmanager
def _told(folder: Path, spread: "Spread | None") -> Generator[None]:
    """One rank says why a checkpoint cannot be written."""
    try:
        yield
    except (OSError, SafetensorError, CheckpointError) as error:
        if spread is not None and not spread.ranks.is_first:  # which says why
            raise PeerError(f"{folder}: the checkpoint cannot be written") from None
        raise CheckpointError(
            f"{folder}: the checkpoint cannot be written ({error}); older ones are as they were"
        ) from None


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


def _twin(model: BlackMamba) -> BlackMamba:
    """A copy of a model, in the host's memory."""
    made = BlackMamba(model.config, device="meta", compute_dtype=model.compute_dtype)
    made.load_state_dict({n: _copy(t) for n, t in model.state_dict().items()}, assign=True)
    return made


def _write_whole(
    folder: Path,
    save_weights: Callable[[Path], None],
    remembered: dict[str, Tensor],
    trainer: str,
) -> None:
    """Write what one process holds."""
    with atomic_folder(folder) as temporary:
        save_weights(temporary)
        save_file(remembered, temporary / _OPTIMIZER)
        settle(temporary / _OPTIMIZER)
        _finish(temporary, trainer, {})


def _temporary(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.tmp")


def _begin(temporary: Path) -> None:
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    except OSError as error:
        raise CheckpointError(f"{temporary}: {error.strerror or error}") from None


def _write_pieces(folder: Path, spread: "Spread", pieces: dict[str, Tensor], trainer: str) -> None:
    """Write what every rank holds; when all is there, the first gives the folder its name."""
    from blackmamba.train.parallel.checkpoint import taken_sums, write_together

    temporary = _temporary(folder)

    def finish() -> None:
        _finish(temporary, trainer, taken_sums(temporary))
        sync(temporary)
        os.replace(temporary, folder)
        sync(folder.parent)

    try:
        write_together(pieces, temporary, spread.group, finish)
    finally:
        if spread.ranks.is_first:
            shutil.rmtree(temporary, ignore_errors=True)


def _pieces(
    spread: "Spread",
    optimizer: torch.optim.Optimizer,
    average: WeightAverage | None,
    copied: bool,
) -> dict[str, Tensor]:
    """All that this rank holds, in the host's memory, under the names of whole files."""
    shards = spread.shards

    def taken(tensor: Tensor) -> Tensor:
        return _copy(tensor) if copied else tensor.detach().cpu()

    saved = _saved_parameters(shards, spread.model)
    own = dict(shards.named_parameters())
    held = {key: shards.spread(name, taken(own[name])) for name, key in saved.items()}
    held |= {n: taken(b) for n, b in _saved_buffers(spread.model).items()}
    for key, value in optimizer_tensors(shards, optimizer, average).items():
        name, quantity = key.split("/")
        held[key] = taken(value) if quantity == "step" else shards.spread(name, taken(value))
    return held


def _finish(temporary: Path, trainer: str, sums: dict[str, str]) -> None:
    """Write what comes last; `sums` are the checksums that are known."""
    (temporary / _TRAINER).write_text(trainer, encoding="utf-8")
    names = sorted(path.name for path in temporary.iterdir())
    sums = {name: sums.get(name) or digest(temporary / name) for name in names}
    (temporary / _CHECKSUMS).write_text(json.dumps(sums, indent=2) + "\n", encoding="utf-8")
    for name in (_TRAINER, _CHECKSUMS):
        settle(temporary / name)


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
    path = folder / _CHECKSUMS
    try:
        sums: Any = json.loads(path.read_text(encoding="utf-8"))
        return {str(name): str(value) for name, value in sums.items()}
    except (OSError, ValueError, AttributeError) as error:
        raise _damaged(path, error) from None


def _check_file(path: Path, sums: dict[str, str]) -> None:
    try:
        found = digest(path)
    except OSError as error:
        raise _damaged(path, error.strerror or error) from None
    if found != sums.get(path.name):
        raise _damaged(path, "its checksum is not the one that was written")


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
        has_checksums = (folders[-1] / _CHECKSUMS).exists()
        if has_checksums:
            _check_file(path, _read_sums(folders[-1]))
        trainer: Any = json.loads(path.read_text(encoding="utf-8"))
        if trainer["format"] not in (1, FORMAT):
            raise CheckpointError(
                f"{path}: format {trainer['format']!r}; this version reads {FORMAT}"
            )
        if trainer["format"] == FORMAT and not has_checksums:
            raise _damaged(folders[-1] / _CHECKSUMS, "it is missing")
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
        raise _damaged(path, error) from None


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
        raise _damaged(checkpoint.folder, error) from None
    path = checkpoint.folder / _OPTIMIZER
    try:
        restore_optimizer(model, optimizer, load_file(path), average)
    except (OSError, ValueError, SafetensorError) as error:
        raise _damaged(path, error) from None


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
    saved = _saved_parameters(holder, model)
    parameters = {n: p for n, p in holder.named_parameters() if n in saved}
    # Where they are in the host's memory, they are filled in place.
    weights = {n: p.detach().cpu() for n, p in parameters.items()}
    buffers = {n: b.cpu() for n, b in _saved_buffers(model).items()}
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
        raise _damaged(checkpoint.folder, error) from None


def _saved_parameters(holder: nn.Module, model: BlackMamba) -> dict[str, str]:
    """By name in the model, the name in a checkpoint: all of them, or the adapters alone."""
    named = holder.named_parameters()
    if adaptation(model) is None:
        return {name: name for name, _ in named}
    return {name: adapter_name(name) for name, p in named if p.requires_grad}


def _saved_buffers(model: BlackMamba) -> dict[str, Tensor]:
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
    for folder in _folders(root):
        if _step_of(folder) > step:
            _remove(folder)


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
