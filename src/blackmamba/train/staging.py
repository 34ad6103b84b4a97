"""Writes checkpoints: of one process whole tensors, of many ranks what each of them holds."""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Collection, Generator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from blackmamba.checkpoint import save
from blackmamba.checkpoint.adapter import write_adapter
from blackmamba.config import to_mapping
from blackmamba.data import Tokenizer
from blackmamba.errors import CheckpointError, PeerError
from blackmamba.files import atomic_folder, digest, settle, sync
from blackmamba.model import BlackMamba
from blackmamba.model.lora import adaptation, adapter_tensors
from blackmamba.train.average import WeightAverage
from blackmamba.train.checkpoints import (
    CHECKSUMS,
    FORMAT,
    OPTIMIZER,
    TRAINER,
    Counters,
    folder_of,
    folders_of,
    remove,
    saved_buffers,
    saved_parameters,
    step_of,
)
from blackmamba.train.config import RunConfig
from blackmamba.train.optimizer import optimizer_tensors
from blackmamba.train.origin import origin

if TYPE_CHECKING:
    from blackmamba.train.parallel.spread import Spread


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
    folder = folder_of(root, counters.step)
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
            for old in folders_of(root)[:-keep]:
                if step_of(old) not in keep_also:
                    remove(old)
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
        save_file(remembered, temporary / OPTIMIZER)
        settle(temporary / OPTIMIZER)
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

    saved = saved_parameters(shards, spread.model)
    own = dict(shards.named_parameters())
    held = {key: shards.spread(name, taken(own[name])) for name, key in saved.items()}
    held |= {n: taken(b) for n, b in saved_buffers(spread.model).items()}
    for key, value in optimizer_tensors(shards, optimizer, average).items():
        name, quantity = key.split("/")
        held[key] = taken(value) if quantity == "step" else shards.spread(name, taken(value))
    return held


def _finish(temporary: Path, trainer: str, sums: dict[str, str]) -> None:
    """Write what comes last; `sums` are the checksums that are known."""
    (temporary / TRAINER).write_text(trainer, encoding="utf-8")
    names = sorted(path.name for path in temporary.iterdir())
    sums = {name: sums.get(name) or digest(temporary / name) for name in names}
    (temporary / CHECKSUMS).write_text(json.dumps(sums, indent=2) + "\n", encoding="utf-8")
    for name in (TRAINER, CHECKSUMS):
        settle(temporary / name)
