"""The tensors of a checkpoint, written and read by all ranks at once.

`torch.distributed.checkpoint` plans it: who writes what, each number once, and which pieces of
which files a rank needs, however many ranks wrote them and however they were cut. The files are
safetensors; each piece says where in its whole it belongs. (torch's own format is a pickle.)
"""

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from blackmamba.errors import CheckpointError
from blackmamba.files import digest
from blackmamba.train.parallel.ranks import is_lost_contact

_SUM = ".sha256"


class _Writer(HuggingFaceStorageWriter):
    """Also sums up what it has written, and calls `finish` on the first rank when all are done."""

    def __init__(self, folder: Path, finish: Callable[[], None]):
        super().__init__(str(folder), save_distributed=True)
        self._folder, self._finish = folder, finish

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        written = super().write_data(plan, planner)
        for name in {Path(str(r.storage_data.relative_path)).name for r in written.wait()}:
            (self._folder / f"{name}{_SUM}").write_text(digest(self._folder / name))
        return written

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        self._finish()


def write_together(
    tensors: Mapping[str, Tensor],
    folder: Path,
    group: dist.ProcessGroup | None,
    finish: Callable[[], None],
) -> None:
    """Write a dictionary of which every rank has its part; all ranks call it.

    Args:
        tensors: pieces as `Shards.spread` gives them, and what all ranks have alike.
        folder: is there, and empty.
        group: of all ranks, for tensors of the host; used by nobody else meanwhile.
        finish: called on the first rank when all files are there.
    Raises:
        CheckpointError: a rank could not write, or `finish` failed; on all ranks.
    """
    try:
        dcp.save(dict(tensors), storage_writer=_Writer(folder, finish), process_group=group)
    except CheckpointException as error:
        raise CheckpointError(_reason(error)) from None


def read_together(
    tensors: Mapping[str, Tensor], folder: Path, group: dist.ProcessGroup | None
) -> None:
    """Fill tensors, whole or pieces, from the files of a folder; all ranks call it.

    Args:
        tensors: to be filled in place.
        folder: of `write_together`, or of safetensors files with whole tensors.
        group: of all ranks; None: there is one process.
    Raises:
        CheckpointError: a tensor is missing or of another shape, or a file cannot be read.
    """
    reader = HuggingFaceStorageReader(str(folder))
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one is meant
            dcp.load(
                dict(tensors), storage_reader=reader, process_group=group, no_dist=group is None
            )
    except CheckpointException as error:
        raise CheckpointError(_reason(error)) from None
    except Exception as error:
        if isinstance(error, RuntimeError) and is_lost_contact(error):
            raise
        raise CheckpointError(" ".join(str(error).split())) from None


def names_in(folder: Path) -> set[str]:
    """Of all tensors in the files of a folder.

    Raises:
        CheckpointError: a file cannot be read.
    """
    names: set[str] = set()
    for path in folder.glob("*.safetensors"):
        try:
            with safe_open(path, framework="pt") as file:
                names.update(file.keys())
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: {error}") from None
    return names


def taken_sums(folder: Path) -> dict[str, str]:
    """By file, what the ranks have summed up; the files that said it are removed."""
    sums: dict[str, str] = {}
    for path in folder.glob(f"*{_SUM}"):
        sums[path.name.removesuffix(_SUM)] = path.read_text()
        path.unlink()
    return sums


def _reason(error: CheckpointException) -> str:
    failures: dict[int, Any] = error.failures
    rank, failure = next(iter(failures.items()))
    reason = failure[0] if isinstance(failure, tuple) else failure
    return f"rank {rank}: {' '.join(str(reason).split())}"
