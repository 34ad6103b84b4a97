"""Training rows out of several sources, as a pure function of (seed, step).

Which source a row comes from: `schedule.py`. Which of the source's windows: every epoch cuts the
source, from a new start, in windows and reads them in an order shuffled over all of it.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from blackmamba.data.config import DataConfig, SourceConfig
from blackmamba.data.packing import (
    Batch,
    Packing,
    PackingKind,
    Sliceable,
    Window,
    empty_rows,
    rows_of_rank,
)
from blackmamba.data.prepare import PreparedData, open_prepared, prepare
from blackmamba.data.schedule import Schedule
from blackmamba.data.shards import Joined, ShardedData
from blackmamba.data.shuffle import Shuffle
from blackmamba.data.tokenizer import Tokenizer
from blackmamba.errors import ConfigError, DataError, InputError


@dataclasses.dataclass(frozen=True)
class Share:
    """What has been read of a source."""

    tokens: int
    epochs: float
    weight: float
    """Of all tokens read."""


class MixtureSampler:
    """Training batches of several sources; there is no state to save.

    Args:
        sources: name and tokens of each.
        configs: their weights and limits, in the same order.
        seq_len: l, inputs of a row.
        batch_size: b, rows of a batch over all ranks.
        seed: at least 0.
        packing: whether documents in a row are told apart.
    Raises:
        ConfigError: an argument is out of range.
        DataError: a source has fewer than seq_len + 1 tokens.
    """

    def __init__(
        self,
        sources: Sequence[tuple[str, Sliceable]],
        configs: Sequence[SourceConfig],
        seq_len: int,
        batch_size: int,
        seed: int,
        packing: Packing = Packing(),  # noqa: B008  # frozen
    ):
        for name, value in (("seq_len", seq_len), ("batch_size", batch_size)):
            if value < 1:
                raise ConfigError(f"{name}={value}: must be at least 1")
        if seed < 0:
            raise ConfigError(f"seed={seed}: must be at least 0")
        for name, tokens in sources:
            if len(tokens) < seq_len + 1:
                raise DataError(
                    f"source {name}: {len(tokens)} training tokens, but seq_len={seq_len} needs "
                    f"{seq_len + 1} or more"
                )
        self._sources = [
            _Windows(name, tokens, seq_len, seed, number)
            for number, (name, tokens) in enumerate(sources)
        ]
        limits = [
            int(config.max_epochs * len(source)) if config.max_epochs else None
            for config, source in zip(configs, self._sources, strict=True)
        ]
        none = [c.name for c, limit in zip(configs, limits, strict=True) if limit == 0]
        if none:
            raise ConfigError(f"source {none[0]}: max_epochs allows not a single row of it")
        self._schedule = Schedule([config.weight for config in configs], limits, seed)
        self._seq_len, self._batch_size, self._packing = seq_len, batch_size, packing

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> Batch:
        """A rank's slice of the batch of training step `step`, counted from 0.

        The slices of all ranks, in order, are the batch of one process.

        Raises:
            ConfigError: batch_size is no multiple of world_size.
            InputError: step is negative.
            DataError: all sources are at their limits, or a shard is damaged.
        """
        n_rows = len(rows_of_rank(step, self._batch_size, rank, world_size))
        rows_bl = empty_rows(n_rows, self._seq_len)
        places = self._places(step, rank, world_size)
        for row, (source, number) in zip(rows_bl, places, strict=True):
            self._sources[source].read(number, row)
        return self._packing.batch(rows_bl)

    def windows(self, step: int, rank: int = 0, world_size: int = 1) -> list[Window]:
        """What each row that `batch` gives for the same arguments is."""
        places = self._places(step, rank, world_size)
        return [self._sources[source].window(number) for source, number in places]

    def usage(self, n_steps: int) -> dict[str, Share]:
        """What the first `n_steps` steps read of each source, by its name."""
        n_rows = n_steps * self._batch_size
        return {
            source.name: Share(n * self._seq_len, n / len(source), n / n_rows if n_rows else 0.0)
            for source, n in zip(self._sources, self._schedule.rows_of(n_rows), strict=True)
        }

    def _places(self, step: int, rank: int, world_size: int) -> list[tuple[int, int]]:
        if step < 0:
            raise InputError(f"step={step}: must be at least 0")
        rows = rows_of_rank(step, self._batch_size, rank, world_size)
        return [self._schedule.source_of(row) for row in rows]


class _Windows:
    """The rows of one source, counted over all epochs."""

    def __init__(self, name: str, tokens: Sliceable, seq_len: int, seed: int, number: int):
        self.name = name
        self._tokens, self._seq_len = tokens, seq_len
        self._seed = (seed, number)
        self._n = len(tokens) // seq_len

    def __len__(self) -> int:
        """Rows of an epoch."""
        return self._n

    def window(self, number: int) -> Window:
        epoch, place = divmod(number, self._n)
        first, order = self._epoch(epoch)
        return Window(self.name, epoch, (first + order[place] * self._seq_len) % len(self._tokens))

    def read(self, number: int, row: np.ndarray[Any, np.dtype[np.int64]]) -> None:
        """Fill (l + 1,) ids; after the source's last token comes its first, an end of text."""
        start = self.window(number).start
        ids = self._tokens[start : start + len(row)]
        row[: len(ids)] = ids
        row[len(ids) :] = self._tokens[: len(row) - len(ids)]

    @functools.cached_property
    def _epoch(self) -> "functools._lru_cache_wrapper[tuple[int, Shuffle]]":
        return functools.lru_cache(maxsize=2)(self._new_epoch)  # a step may touch two

    def _new_epoch(self, epoch: int) -> tuple[int, Shuffle]:
        random = np.random.Generator(np.random.Philox([*self._seed, epoch, 0]))
        return int(random.integers(len(self._tokens))), Shuffle(self._n, *self._seed, epoch, 1)


class MixtureData:
    """The sources of a mixture, opened, like one `PreparedData`.

    Args:
        config: with sources.
        folder: of the run's data; texts are prepared in there.
    Raises:
        DataError: a source is missing, damaged or has another tokenizer; nothing is held out.
    """

    validation_text: Path | None = None
    """There is no file of it."""

    def __init__(self, config: DataConfig, folder: Path):
        self._config = config
        opened: dict[str, PreparedData | ShardedData] = {
            source.name: open_prepared(source.path) for source in config.sources if source.path
        }
        tokenizer = config.tokenizer
        if opened:
            tokenizer = str(next(iter(opened.values())).folder)
            if config.tokenizer != "train":
                opened_with = Tokenizer.load(config.tokenizer)
                _check_same({"data.tokenizer": opened_with} | _tokenizers(opened))
        for source in config.sources:
            if source.text:
                own = dataclasses.replace(
                    config, sources=(), text=source.text, tokenizer=tokenizer, packing="stream"
                )
                opened[source.name] = prepare(own, folder / source.name)
        self._opened = {source.name: opened[source.name] for source in config.sources}
        _check_same(_tokenizers(self._opened))
        self.tokenizer = next(iter(self._opened.values())).tokenizer
        self.validation = _Validation(list(self._opened.values()))
        if not self.validation.n_tokens:
            raise DataError("no source of the mixture has anything held out for validation")

    @property
    def held_out(self) -> dict[str, Sliceable]:
        """The tokens that each source holds out for validation, of those that do."""
        splits = {name: data.validation for name, data in self._opened.items()}
        return {name: split.tokens for name, split in splits.items() if split.n_tokens}

    @property
    def fingerprint(self) -> str:
        """Of what all sources were made from."""
        parts = [[name, data.fingerprint] for name, data in self._opened.items()]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def sampler(
        self, seq_len: int, batch_size: int, seed: int, packing: PackingKind = "stream"
    ) -> MixtureSampler:
        """The rows that training reads."""
        sources = [(name, data.train.tokens) for name, data in self._opened.items()]
        settings = Packing(kind=packing, eot_id=self.tokenizer.eot_id)
        return MixtureSampler(sources, self._config.sources, seq_len, batch_size, seed, settings)


class _Validation:
    """What all sources hold out, one after the other."""

    def __init__(self, sources: Sequence[PreparedData | ShardedData]):
        splits = [data.validation for data in sources if data.validation.n_tokens]
        self.n_tokens = sum(split.n_tokens for split in splits)
        self.n_bytes = sum(split.n_bytes for split in splits)
        self.n_documents = sum(split.n_documents for split in splits)
        self.tokens = Joined([split.tokens for split in splits])


def _tokenizers(sources: dict[str, PreparedData | ShardedData]) -> dict[str, Tokenizer]:
    return {name: data.tokenizer for name, data in sources.items()}


def _check_same(tokenizers: dict[str, Tokenizer]) -> None:
    first, *others = tokenizers
    for name in others:
        if tokenizers[name].fingerprint != tokenizers[first].fingerprint:
            raise DataError(
                f"{name}: its tokens are of another tokenizer ({tokenizers[name].n_tokens} tokens) "
                f"than those of {first} ({tokenizers[first].n_tokens}); prepare one of them again"
            )
