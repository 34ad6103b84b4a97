"""Text of any size to a folder of shards: `prepare_shards`; many machines' folders to one.

One process reads the documents in order and cuts them in blocks, workers split and encode the
blocks, and their results are written in order: the files do not depend on the number of workers.
After each shard the index says how far it got, so that whatever ends a run, the same call goes on
from the last whole shard, and comes to the same bytes.
"""

import contextlib
import dataclasses
import fcntl
import itertools
import logging
import os
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import numpy as np

from blackmamba.config import to_mapping
from blackmamba.data.config import ShardConfig
from blackmamba.data.encoding import BlockEncoder, Encoded
from blackmamba.data.holdout import document_hash
from blackmamba.data.identity import digest, fingerprints
from blackmamba.data.shards import (
    INDEX,
    SHARD_FORMAT,
    TOKENIZER,
    ShardedData,
    ShardIndex,
    ShardWriter,
    temporary_of,
)
from blackmamba.data.text import Source, find_sources
from blackmamba.data.tokenizer import Tokenizer
from blackmamba.data.tokens import Counts, dtype_for
from blackmamba.data.workers import in_order
from blackmamba.errors import ConfigError, DataError

_BLOCK_CHARACTERS = 2**20
_LOCK = ".lock"
_SIDES = ("train", "validation")

_logger = logging.getLogger(__name__)


@dataclasses.dataclass
class Done:
    """How far it has got."""

    n_documents: int = 0
    n_tokens: int = 0
    n_bytes: int = 0
    """UTF-8 bytes of text."""

    def add(self, counts: Counts) -> None:
        """Count more."""
        self.n_documents += counts.n_documents
        self.n_tokens += counts.n_tokens
        self.n_bytes += counts.n_bytes


def prepare_shards(
    config: ShardConfig,
    folder: str | Path,
    *,
    n_workers: int = 1,
    on_progress: Callable[[Done], None] | None = None,
) -> ShardIndex:
    """Make the folder of shards for `config`, or go on with it, or find it finished.

    Args:
        folder: of this text alone; a part goes into its `part_folder` there.
        n_workers: processes that encode; any number gives the same files.
        on_progress: is told before the first block and after each, in this run's own counts.
    Raises:
        DataError: a text or the tokenizer is missing or damaged; the folder is something else, was
            begun with other settings or text, is in use, or cannot be written. What is written is
            kept.
    """
    if n_workers < 1:
        raise ConfigError(f"n_workers={n_workers}: must be at least 1")
    folder = Path(folder) / config.part_folder
    sources = find_sources(config.text, config.field)
    if config.n_parts > 1:
        sources = _dealt(sources, config)
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder):
            index = _begin(config, folder, sources)
            if not index.finished:
                index = _Build(config, folder, sources, index).run(n_workers, on_progress)
    return index


def join_parts(folder: str | Path) -> ShardIndex:
    """Make the index of a whole whose parts are finished, in their order; no shard is moved.

    Raises:
        DataError: a part is missing or not finished, or two were made with different settings.
    """
    folder = Path(folder)
    names = sorted(path.name for path in folder.glob("part-*-of-*") if path.is_dir())
    if not names:
        raise DataError(f"{folder}: has no parts (folders such as part-00000-of-00004)")
    parts = [ShardedData(folder / name).index for name in names]
    first = parts[0]
    if [(p.part, p.n_parts) for p in parts] != [(i, first.n_parts) for i in range(first.n_parts)]:
        raise DataError(f"{folder}: has {len(parts)} parts ({', '.join(names)}) of {first.n_parts}")
    for name, part in zip(names, parts, strict=True):
        for field in ("tokenizer", "validation_fraction", "split_seed"):
            if getattr(part, field) != getattr(first, field):
                raise DataError(f"{folder / name}: made with another {field} than {names[0]}")
    joined = dataclasses.replace(
        first,
        fingerprint=digest([part.fingerprint for part in parts]),
        part=0,
        n_parts=1,
        **{
            side: tuple(
                dataclasses.replace(shard, file=f"{name}/{shard.file}")
                for name, part in zip(names, parts, strict=True)
                for shard in getattr(part, side)
            )
            for side in _SIDES
        },
    )
    with _writing(folder):
        Tokenizer.from_file(folder / names[0] / TOKENIZER).save(folder / TOKENIZER)
        joined.write(folder / INDEX)
    return joined


def sample_documents(sources: list[Source], n_characters: float, seed: int = 0) -> Iterator[str]:
    """About so many characters of text, taken evenly from the beginnings of the sources.

    The sources come in an order drawn by `seed`, so that a few of very many are a fair sample.
    """
    order = np.random.Generator(np.random.Philox(seed)).permutation(len(sources))
    share = max(n_characters / len(sources), 2**20)
    for i in order:
        taken = 0
        for text in sources[i].documents():
            yield text
            taken += len(text)
            if taken >= min(share, n_characters):
                break
        n_characters -= taken
        if n_characters <= 0:
            return


# ---- beginning ------------------------------------------------------------------------------


def _dealt(sources: list[Source], config: ShardConfig) -> list[Source]:
    """This part's share."""
    mine: list[Source] = []
    for number, source in enumerate(sources):
        share = source.share
        if share is not None:
            documents = _Share(share, config.part, config.n_parts)
            mine.append(dataclasses.replace(source, documents=documents))
        elif number % config.n_parts == config.part:
            mine.append(source)
    if not mine:
        raise DataError(
            f"part {config.part} of {config.n_parts}: {len(sources)} files are too few for it"
        )
    return mine


@dataclasses.dataclass(frozen=True)
class _Share:
    """Documents of one share of a source."""

    read: Callable[[int, int], Iterator[str]]
    part: int
    n_parts: int

    def __call__(self) -> Iterator[str]:
        return self.read(self.part, self.n_parts)


def _begin(config: ShardConfig, folder: Path, sources: list[Source]) -> ShardIndex:
    """The index to go on from, with its tokenizer beside it."""
    given = None if config.tokenizer == "train" else Tokenizer.load(config.tokenizer)
    fingerprint, *others = fingerprints(SHARD_FORMAT, to_mapping(config), sources, given)
    _check_own(folder)
    if (folder / INDEX).exists():
        index = ShardIndex.read(folder / INDEX)
        if index.fingerprint not in (fingerprint, *others):
            raise DataError(
                f"{folder}: was begun with other settings or text, which may have changed since; "
                "remove it to begin anew, or choose another folder"
            )
        if Tokenizer.from_file(folder / TOKENIZER).fingerprint != index.tokenizer:
            raise DataError(f"{folder / TOKENIZER}: not the tokenizer that the tokens are of")
        return index
    tokenizer = given or _trained(config, sources)
    tokenizer.save(folder / TOKENIZER)
    index = ShardIndex(
        format=SHARD_FORMAT,
        fingerprint=fingerprint,
        tokenizer=tokenizer.fingerprint,
        vocab_size=tokenizer.n_tokens,
        dtype=dtype_for(tokenizer.n_tokens),
        validation_fraction=config.validation_fraction,
        split_seed=config.split_seed,
        part=config.part,
        n_parts=config.n_parts,
        finished=False,
        source=0,
        document=0,
        train=(),
        validation=(),
    )
    index.write(folder / INDEX)  # before any shard: from now on the folder is known as ours
    return index


def _trained(config: ShardConfig, sources: list[Source]) -> Tokenizer:
    _logger.info("training a tokenizer of %d tokens", config.vocab_size)
    limit, key = _holdout(config)
    texts = sample_documents(sources, config.sample_mb * 1e6)
    tokenizer = Tokenizer.train(
        (text for text in texts if document_hash(text.encode(), key) >= limit), config.vocab_size
    )
    if tokenizer.n_tokens < config.vocab_size:
        _logger.warning(
            "the text has words for only %d of %d tokens", tokenizer.n_tokens, config.vocab_size
        )
    return tokenizer


def _check_own(folder: Path) -> None:
    """Never write among other people's files."""
    names = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    if INDEX in names or names <= {TOKENIZER} or all(n.startswith("part-") for n in names):
        return
    raise DataError(
        f"{folder}: has other files, such as {min(names - {TOKENIZER})}; the prepared text needs a "
        "folder of its own"
    )


def _holdout(config: ShardConfig) -> tuple[int, bytes]:
    """Documents hashed below the limit, by that key, are held out."""
    return int(config.validation_fraction * 2**64), str(config.split_seed).encode()


@contextlib.contextmanager
def _writing(folder: Path) -> Generator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{folder}: cannot be written ({error.strerror or error}); whole shards are kept: make "
            "room and run the same again to go on"
        ) from None


@contextlib.contextmanager
def _locked(folder: Path) -> Generator[None]:
    """Only one process writes in a folder; the system frees the lock of one that was killed."""
    handle = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise DataError(f"{folder}: another process is preparing text in it") from None
    try:
        yield
    finally:
        os.close(handle)


# ---- going on -------------------------------------------------------------------------------

_Place = tuple[int, int]  # a source's number, and documents of it that are done


class _Build:
    """Writes the shards that are missing."""

    def __init__(self, config: ShardConfig, folder: Path, sources: list[Source], index: ShardIndex):
        self._config, self._folder, self._sources, self._index = config, folder, sources, index
        self._number = 0  # of the next shard
        for shard in (*index.train, *index.validation):
            self._number = max(self._number, int(shard.file[-10:-4]) + 1)

    def run(self, n_workers: int, on_progress: Callable[[Done], None] | None) -> ShardIndex:
        """All blocks that are left."""
        self._remove_leftovers()
        tokenizer = Tokenizer.from_file(self._folder / TOKENIZER)
        places: list[_Place] = []  # where the blocks end that the workers have
        done, most = Done(), self._config.shard_mb * 1e6
        with in_order(_encoder, (tokenizer.to_json(), *_holdout(self._config)), n_workers) as map_:
            results = map_(self._blocks(places))
            if on_progress is not None:
                on_progress(done)  # from here on it is encoding
            encoded = next(results, None)
            while encoded is not None:
                with self._shard() as writers:
                    place = (self._index.source, self._index.document)
                    while encoded is not None and sum(w.n_bytes for w in writers) < most:
                        place = places.pop(0)
                        for writer, (ids, counts) in zip(writers, encoded, strict=True):
                            writer.add(ids, counts)
                            done.add(counts)
                        if on_progress is not None:
                            on_progress(done)
                        encoded = next(results, None)
                    self._commit(writers, place)
        if not self._index.train:
            raise DataError(f"text {', '.join(self._config.text)}: nothing in it to train on")
        if self._config.validation_fraction and not self._index.validation:
            _logger.warning(
                "%s: no document was held out; raise validation_fraction=%g for validation",
                self._folder, self._config.validation_fraction,
            )  # fmt: skip
        self._save(finished=True, source=len(self._sources), document=0)
        return self._index

    def _blocks(self, places: list[_Place]) -> Iterator[list[str]]:
        """Documents in blocks of some `_BLOCK_CHARACTERS`, from where the index stopped.

        What a block holds follows from where it begins, and shards end with blocks.
        """
        block: list[str] = []
        length = 0
        first, skipped = self._index.source, self._index.document
        for number in range(first, len(self._sources)):
            skip = skipped if number == first else 0
            documents = itertools.islice(self._sources[number].documents(), skip, None)
            for document, text in enumerate(documents, skip + 1):
                block.append(text)
                length += len(text)
                if length >= _BLOCK_CHARACTERS:
                    places.append((number, document))
                    yield block
                    block, length = [], 0
        if block:
            places.append((len(self._sources), 0))
            yield block

    @contextlib.contextmanager
    def _shard(self) -> Generator[list[ShardWriter]]:
        """Both sides' next shards; nothing is left of them if it does not end well."""
        writers: list[ShardWriter] = []
        try:
            for side in _SIDES:
                path = self._folder / f"{side}-{self._number:06}.bin"
                writers.append(ShardWriter(path))
            yield writers
        finally:
            for writer in writers:
                writer.abandon()

    def _commit(self, writers: list[ShardWriter], place: _Place) -> None:
        shards = [writer.finish() for writer in writers]
        index = self._index
        self._save(
            source=place[0],
            document=place[1],
            train=(*index.train, *filter(None, shards[:1])),
            validation=(*index.validation, *filter(None, shards[1:])),
        )
        self._number += 1

    def _save(self, **changes: object) -> None:
        self._index = dataclasses.replace(self._index, **changes)  # pyright: ignore
        self._index.write(self._folder / INDEX)

    def _remove_leftovers(self) -> None:
        """Shards that were begun, or finished but not yet in the index, when a run was killed."""
        known = {shard.file for shard in (*self._index.train, *self._index.validation)}
        for side in _SIDES:
            for path in self._folder.glob(f"{side}-*.bin"):
                if path.name not in known:
                    path.unlink()
            for path in self._folder.glob(temporary_of(Path(f"{side}-*.bin")).name):
                path.unlink()
        for path in self._folder.glob(f".{INDEX}.*.tmp"):
            path.unlink()


def _encoder(tokenizer: str, limit: int, key: bytes) -> Callable[[list[str]], tuple[Encoded, ...]]:
    """What a worker does to a block."""
    import tokenizers

    return BlockEncoder(Tokenizer(tokenizers.Tokenizer.from_str(tokenizer)), limit, key)
