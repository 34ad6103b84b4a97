"""Rows of ids to training batches: inputs, labels, and where a row's documents begin.

Letters: `b` batch, `l` sequence.
"""

import dataclasses
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from blackmamba.errors import ConfigError

IGNORED = -100
"""Label of a place where nothing is predicted."""

PackingKind = Literal["stream", "documents", "masked"]
Rows = np.ndarray[Any, np.dtype[np.int64]]


class Sliceable(Protocol):
    """Ids that can be counted and sliced: an array, or many files that look like one."""

    def __len__(self) -> int: ...

    def __getitem__(self, place: slice, /) -> np.ndarray[Any, np.dtype[np.integer[Any]]]: ...


class Batch(NamedTuple):
    """What a training step reads."""

    input_ids: Tensor
    """(b, l) int64."""
    labels: Tensor
    """(b, l) int64: the token after each input, or -100."""
    seq_idx: Tensor | None
    """(b, l) int32: a row's documents counted from 0; None where they are not told apart."""

    def piece(self, place: int, ways: int) -> "Batch":
        """The piece number `place` of every row, cut in `ways` of equal length."""
        l = self.input_ids.shape[1] // ways
        assert l * ways == self.input_ids.shape[1]
        input_ids, labels, seq_idx = (
            None if t is None else t[:, place * l : (place + 1) * l] for t in self
        )
        assert input_ids is not None
        assert labels is not None
        return Batch(input_ids, labels, seq_idx)


class Window(NamedTuple):
    """Where a row was read."""

    source: str
    """Its name in a mixture; "text" where there is but one."""
    epoch: int
    start: int
    """First token, counted in the source."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Packing:
    """How a row with several documents is read."""

    kind: PackingKind = "stream"
    """"stream": as one text, ends of text inside. "documents": each from an empty memory, by
    `seq_idx`. "masked": that, and a document's last token predicts nothing: neither across the
    boundary nor that the document ends, so such a model never writes end of text."""
    eot_id: int = -1
    """The id that every document begins with; unused for "stream"."""

    def batch(self, rows_bl: Rows) -> Batch:
        """Inputs and labels of rows of l + 1 ids each, of which the last is a label alone."""
        ids = torch.from_numpy(rows_bl)
        input_ids, labels = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
        if self.kind == "stream":
            return Batch(input_ids, labels, None)
        begins = input_ids == self.eot_id
        begins[:, 0] = False
        seq_idx = begins.cumsum(1, dtype=torch.int32)
        if self.kind == "masked":
            labels = labels.masked_fill(labels == self.eot_id, IGNORED)  # may share memory
        return Batch(input_ids, labels, seq_idx)


def empty_rows(n: int, seq_len: int) -> Rows:
    """Room for so many rows of a batch and the token after each, (n, seq_len + 1).

    A batch that is too large fails here, before its rows are looked up one by one.

    Raises:
        MemoryError: there is not as much.
    """
    try:
        return np.empty((n, seq_len + 1), np.int64)
    except ValueError as error:  # more than any machine has
        raise MemoryError(str(error)) from None


def rows_of_rank(step: int, batch_size: int, rank: int, world_size: int) -> range:
    """Numbers of the rows that a rank reads in a step; all ranks' in order are the whole batch's.

    Raises:
        ConfigError: the rows cannot be dealt out evenly, or there is no such rank.
    """
    if world_size < 1 or not 0 <= rank < world_size:
        raise ConfigError(f"rank {rank} of {world_size}: must be 0 .. world_size - 1")
    if batch_size % world_size:
        raise ConfigError(
            f"batch_size={batch_size}: must be a multiple of the {world_size} ranks that read it"
        )
    share = batch_size // world_size
    first = step * batch_size + rank * share
    return range(first, first + share)
