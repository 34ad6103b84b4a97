"""Batches out of token files: shuffled windows to train on, parallel streams to validate with.

Letters: `b` batch, `l` sequence.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from blackmamba.data.packing import (
    IGNORED,
    Batch,
    Packing,
    Sliceable,
    Window,
    empty_rows,
    rows_of_rank,
)
from blackmamba.errors import ConfigError, DataError, InputError


class WindowSampler:
    """Training batches as a pure function of (seed, step): there is no state to save.

    An epoch takes the token file as a ring, starts somewhere on it, and cuts it in windows of
    `seq_len` inputs, one after the other, to be read in shuffled order; the label of each input is
    the token after it. So every token is an input once and a label once in an epoch, but for the
    n_tokens % seq_len that are left over, elsewhere each time. (After the file's last token comes
    its first: an end of text, as after any document.) Start and order are new in every epoch. A
    batch that an epoch's end falls into goes on with the next epoch.

    Args:
        tokens: (n_tokens,), any integer type, usually memory-mapped.
        seq_len: l, inputs of a window.
        batch_size: b, windows of a batch, over all ranks.
        seed: at least 0.
        packing: whether documents in a window are told apart.
    Raises:
        ConfigError: an argument is out of range.
        DataError: there are fewer than seq_len + 1 tokens.
    """

    def __init__(
        self,
        tokens: Sliceable,
        seq_len: int,
        batch_size: int,
        seed: int,
        packing: Packing = Packing(),  # noqa: B008  # frozen
    ):
        _check_at_least_1(seq_len=seq_len, batch_size=batch_size)
        if seed < 0:
            raise ConfigError(f"seed={seed}: must be at least 0")
        if len(tokens) < seq_len + 1:
            raise DataError(
                f"{len(tokens)} training tokens: seq_len={seq_len} needs {seq_len + 1} or more; "
                "use more text or a smaller seq_len"
            )
        self._tokens = tokens
        self._seq_len = seq_len
        self._batch_size = batch_size
        self._seed = seed
        self._packing = packing
        self.n_windows = len(tokens) // seq_len
        """Windows of an epoch."""
        self._epoch = -1  # whose starts are kept
        self._starts = np.empty(0, np.int64)

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> Batch:
        """A rank's slice of the batch of training step `step`, counted from 0.

        The slices of all ranks, in order, are the batch of one process.

        Raises:
            ConfigError: batch_size is no multiple of world_size.
            InputError: step is negative.
        """
        n_rows = len(rows_of_rank(step, self._batch_size, rank, world_size))
        rows_bl = empty_rows(n_rows, self._seq_len)
        places = self.windows(step, rank, world_size)
        for row, (_, _, start) in zip(rows_bl, places, strict=True):
            ids = self._tokens[start : start + self._seq_len + 1]
            row[: len(ids)] = ids
            row[len(ids) :] = self._tokens[: self._seq_len + 1 - len(ids)]
        return self._packing.batch(rows_bl)

    def windows(self, step: int, rank: int = 0, world_size: int = 1) -> list[Window]:
        """What each row that `batch` gives for the same arguments is."""
        if step < 0:
            raise InputError(f"step={step}: must be at least 0")
        numbers = rows_of_rank(step, self._batch_size, rank, world_size)
        places = (divmod(number, self.n_windows) for number in numbers)
        return [
            Window("text", epoch, int(self._starts_of(epoch)[place])) for epoch, place in places
        ]

    def _starts_of(self, epoch: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        if epoch != self._epoch:
            random = np.random.Generator(np.random.Philox([self._seed, epoch]))
            first = random.integers(len(self._tokens))
            order = random.permutation(self.n_windows)
            self._starts = (first + order * self._seq_len) % len(self._tokens)
            self._epoch = epoch
        return self._starts


class ValidationStreams:
    """A token file read once, in parallel streams: every token is predicted exactly once.

    The file is cut in `batch_size` streams of equal length (the last ones a token shorter where it
    does not divide). Iterating gives (input_ids, labels), both (b, l) int64: the streams' next
    `seq_len` tokens and what precedes each. Carry the model's state from one to the next. A
    stream's first token is predicted from the token before it, the file's first from end of text.
    Only the last column of all can hold labels of -100.

    Args:
        tokens: (n_tokens,), any integer type.
        batch_size: most streams; there are no more than tokens.
        seq_len: l; the last piece is shorter where it does not divide.
        eot_id: the end-of-text id.
    Raises:
        ConfigError: an argument is out of range.
        DataError: there are no tokens.
    """

    def __init__(self, tokens: Sliceable, batch_size: int, seq_len: int, eot_id: int):
        _check_at_least_1(batch_size=batch_size, seq_len=seq_len)
        if len(tokens) == 0:
            raise DataError("0 validation tokens: nothing can be predicted")
        self._tokens = tokens
        self._seq_len = seq_len
        self._eot_id = eot_id
        self.batch_size = min(batch_size, len(tokens))
        self.n_predicted = len(tokens)
        """Labels that are not -100, over one iteration."""

    def __len__(self) -> int:
        """Pieces of one iteration."""
        return -(-self._longest // self._seq_len)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        short, n_longer = divmod(len(self._tokens), self.batch_size)
        rows = np.arange(self.batch_size)
        starts = rows * short + np.minimum(rows, n_longer)
        ends = np.append(starts[1:], len(self._tokens))
        for begin in range(0, self._longest, self._seq_len):
            n = min(self._seq_len, self._longest - begin)
            piece_bl = np.full((self.batch_size, n + 1), IGNORED, np.int64)
            for row, (start, end) in enumerate(zip(starts + begin, ends, strict=True)):
                ids = self._tokens[max(start - 1, 0) : min(start + n, end)]
                first = 0
                if start == 0:
                    piece_bl[row, 0] = self._eot_id
                    first = 1
                piece_bl[row, first : first + len(ids)] = ids
            yield _shifted(piece_bl)

    @property
    def _longest(self) -> int:
        return -(-len(self._tokens) // self.batch_size)


def _shifted(ids_bl: np.ndarray[Any, np.dtype[np.int64]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and, one place on, labels."""
    ids = torch.from_numpy(ids_bl)
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def _check_at_least_1(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise ConfigError(f"{name}={value}: must be at least 1")
