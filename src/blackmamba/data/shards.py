"""Token shards: a prepared text of any size, in files of bounded size, every block checked.

FOLDER/
    tokenizer.json     index.json                what is there, with exact counts
    train-000000.bin   validation-000000.bin     train-000001.bin   ...

A shard holds little-endian ids, each document's after an end of text, and then a CRC-32 (4 bytes,
little-endian) of every `BLOCK_BYTES` of them, so that what is read at random is checked at a cost
that does not grow with the shard. Opening checks that every file is there and of the right size;
reading checks each block when it is first read; `verify` checks everything by SHA-256.
"""

import bisect
import contextlib
import dataclasses
import hashlib
import itertools
import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from blackmamba.config import to_mapping
from blackmamba.data.packing import Sliceable
from blackmamba.data.tokenizer import Tokenizer
from blackmamba.data.tokens import Counts, Dtype, read_index
from blackmamba.errors import DataError
from blackmamba.files import settle, sync, write_text

SHARD_FORMAT = 2
"""Of index.json; 1 is the folder of `PreparedData`."""
BLOCK_BYTES = 2**16
INDEX, TOKENIZER = "index.json", "tokenizer.json"

Ids = np.ndarray[Any, np.dtype[np.integer[Any]]]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ShardInfo:
    """What index.json says of a shard."""

    file: str
    """Relative to the index's folder."""
    counts: Counts
    sha256: str
    """Of the whole file, checksums of its blocks included."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ShardIndex:
    """What index.json says of a folder of shards."""

    format: int
    fingerprint: str
    """Of the settings and texts that it was made from."""
    tokenizer: str
    """`Tokenizer.fingerprint`."""
    vocab_size: int
    dtype: Dtype
    validation_fraction: float
    split_seed: int
    part: int
    n_parts: int
    finished: bool
    source: int
    """Where to go on in the text while not finished: the source ..."""
    document: int
    """... and how many of its documents are done."""
    train: tuple[ShardInfo, ...]
    validation: tuple[ShardInfo, ...]

    @classmethod
    def read(cls, path: Path) -> "ShardIndex":
        """Read an index.json.

        Raises:
            DataError: it is missing, damaged, or of another format.
        """
        return read_index(cls, path, SHARD_FORMAT)

    def write(self, path: Path) -> None:
        """Write it as index.json, whole or not at all."""
        write_text(path, json.dumps(to_mapping(self), indent=1) + "\n")


class ShardedData:
    """A folder of shards, opened like a `PreparedData`.

    Args:
        folder: made by `prepare_shards` or `join_parts`.
    Raises:
        DataError: it is not finished, a file is missing or of the wrong size, or the tokenizer is
            not that of the tokens.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.index = index = ShardIndex.read(self.folder / INDEX)
        if not index.finished:
            raise DataError(
                f"{self.folder}: not finished; run the same `blackmamba data prepare` again, which "
                "goes on where it stopped"
            )
        self.tokenizer = Tokenizer.from_file(self.folder / TOKENIZER)
        if (self.tokenizer.fingerprint, self.tokenizer.n_tokens) != (
            index.tokenizer,
            index.vocab_size,
        ):
            raise DataError(f"{self.folder / TOKENIZER}: not the tokenizer that the tokens are of")
        self.train = ShardedSplit(self.folder, index, index.train)
        self.validation = ShardedSplit(self.folder, index, index.validation)

    @property
    def fingerprint(self) -> str:
        """Of the settings and texts that it was made from."""
        return self.index.fingerprint


class ShardedSplit:
    """One side of the text: its counts, and its ids as one long sequence."""

    def __init__(self, folder: Path, index: ShardIndex, shards: Sequence[ShardInfo]):
        self.n_tokens = sum(s.counts.n_tokens for s in shards)
        """Ids, the end-of-text one before each document included."""
        self.n_bytes = sum(s.counts.n_bytes for s in shards)
        """UTF-8 bytes of its documents, with nothing between them."""
        self.n_documents = sum(s.counts.n_documents for s in shards)
        self.tokens = Joined([Shard(folder / s.file, index, s) for s in shards])


class Joined:
    """Several sequences of ids as one that can be sliced; nothing else is read."""

    def __init__(self, parts: Sequence[Sliceable]):
        self._parts = parts
        self._ends = list(itertools.accumulate(map(len, parts)))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, place: slice) -> Ids:
        """(n,) ids, a copy.

        Raises:
            DataError: a block of them is damaged.
        """
        start, stop, step = place.indices(len(self))
        assert step == 1
        found: list[Ids] = []
        number = bisect.bisect_right(self._ends, start)
        while start < stop:
            first = self._ends[number] - len(self._parts[number])
            end = min(stop, self._ends[number])
            found.append(self._parts[number][start - first : end - first])
            start, number = end, number + 1
        if len(found) == 1:
            return found[0]
        return np.concatenate(found) if found else np.empty(0, np.uint16)


class Shard:
    """One file of ids, memory-mapped when it is first read.

    Raises:
        DataError: it is missing, of the wrong size, or has ids that its tokenizer lacks.
    """

    def __init__(self, path: Path, index: ShardIndex, info: ShardInfo):
        self.path, self.info = path, info
        self._dtype = np.dtype(index.dtype).newbyteorder("<")
        self._n_id_bytes = info.counts.n_tokens * self._dtype.itemsize
        n_blocks = -(-self._n_id_bytes // BLOCK_BYTES)
        size = self._n_id_bytes + 4 * n_blocks
        try:
            found = path.stat().st_size
        except OSError as error:
            raise DataError(f"{path}: missing shard ({error.strerror})") from None
        if found != size:
            raise DataError(f"{path}: {found} bytes instead of {size}; {_DAMAGED}")
        if not 0 <= info.counts.max_id < index.vocab_size:
            raise DataError(
                f"{path}: ids up to {info.counts.max_id}, but its tokenizer has "
                f"{index.vocab_size} tokens; they do not belong together"
            )
        self._bytes: np.memmap[Any, np.dtype[np.uint8]] | None = None
        self._is_checked = np.zeros(n_blocks, bool)

    def __len__(self) -> int:
        return self.info.counts.n_tokens

    def __getitem__(self, place: slice) -> Ids:
        """(n,) ids, a copy, after a check of the blocks that they lie in."""
        start, stop, _ = place.indices(len(self))
        begin, end = start * self._dtype.itemsize, stop * self._dtype.itemsize
        content = self._open()
        for block in range(begin // BLOCK_BYTES, -(-end // BLOCK_BYTES)):
            if not self._is_checked[block]:
                self._check(block)
        return np.array(content[begin:end].view(self._dtype))

    def verify(self, eot_id: int) -> None:
        """Read all of it.

        Raises:
            DataError: it is not the file that was written, or not what the index says of it.
        """
        try:
            with self.path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read ({error.strerror})") from None
        if digest != self.info.sha256:
            raise DataError(f"{self.path}: its SHA-256 is not the index's; {_DAMAGED}")
        ids = self._open()[: self._n_id_bytes].view(self._dtype)
        counts = self.info.counts
        found = (int(ids.max()), int(np.count_nonzero(ids == eot_id)))
        if found != (counts.max_id, counts.n_documents):
            raise DataError(
                f"{self.path}: {found[1]} documents, ids up to {found[0]}, but its index says "
                f"{counts.n_documents} and {counts.max_id}"
            )

    def _open(self) -> "np.memmap[Any, np.dtype[np.uint8]]":
        if self._bytes is None:
            try:
                self._bytes = np.memmap(self.path, np.uint8, mode="r")
            except OSError as error:
                raise DataError(f"{self.path}: cannot be read ({error.strerror})") from None
        return self._bytes

    def _check(self, block: int) -> None:
        content = self._open()
        begin = block * BLOCK_BYTES
        ids = content[begin : min(begin + BLOCK_BYTES, self._n_id_bytes)]
        at = self._n_id_bytes + 4 * block
        if zlib.crc32(ids.tobytes()) != int.from_bytes(content[at : at + 4].tobytes(), "little"):
            raise DataError(f"{self.path}: wrong checksum of the block at byte {begin}; {_DAMAGED}")
        self._is_checked[block] = True


class ShardWriter:
    """Writes a shard under a temporary name; memory stays flat.

    Args:
        path: the final name.
    """

    def __init__(self, path: Path):
        self.path = path
        self._temporary = temporary_of(path)
        self._file = self._temporary.open("wb")
        self._sha256 = hashlib.sha256()
        self._checksums = bytearray()
        self._rest = b""
        self.n_bytes = 0
        """Of ids, so far."""
        self._counts = Counts(n_tokens=0, n_bytes=0, n_documents=0, max_id=0)

    def add(self, ids: bytes, counts: Counts) -> None:
        """Append encoded documents.

        Raises:
            OSError: as writing raised it.
        """
        old = self._counts
        self._counts = Counts(
            n_tokens=old.n_tokens + counts.n_tokens,
            n_bytes=old.n_bytes + counts.n_bytes,
            n_documents=old.n_documents + counts.n_documents,
            max_id=max(old.max_id, counts.max_id),
        )
        self.n_bytes += len(ids)
        content = self._rest + ids
        n_whole = len(content) // BLOCK_BYTES * BLOCK_BYTES
        self._write(content[:n_whole])
        self._rest = content[n_whole:]

    def finish(self) -> ShardInfo | None:
        """Put it under its final name; None, and no file, if it is empty.

        Raises:
            OSError: as writing raised it.
        """
        self._write(self._rest)
        self._file.write(self._checksums)
        self._sha256.update(self._checksums)
        self._file.close()
        if not self.n_bytes:
            self._temporary.unlink()
            return None
        settle(self._temporary)
        self._temporary.replace(self.path)
        sync(self.path.parent)
        return ShardInfo(file=self.path.name, counts=self._counts, sha256=self._sha256.hexdigest())

    def abandon(self) -> None:
        """Leave no file, if it is not finished."""
        with contextlib.suppress(OSError):  # what is still to be written no longer matters
            self._file.close()
        self._temporary.unlink(missing_ok=True)

    def _write(self, content: bytes) -> None:
        view = memoryview(content)
        for begin in range(0, len(content), BLOCK_BYTES):
            checksum = zlib.crc32(view[begin : begin + BLOCK_BYTES])
            self._checksums += checksum.to_bytes(4, "little")
        self._file.write(content)
        self._sha256.update(content)


def is_sharded(folder: Path) -> bool:
    """Whether a folder's index is one of shards, as far as it can be read."""
    try:
        content = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.get("format") == SHARD_FORMAT


def temporary_of(path: Path) -> Path:
    """Where a shard is written before it is whole."""
    return path.with_name(f".{path.name}.tmp")


def verify(folder: str | Path) -> list[str]:
    """Check a folder of shards wholly.

    Returns:
        What is wrong, a message a file; empty if nothing is.
    Raises:
        DataError: the index or the tokenizer is missing, damaged or does not match.
    """
    folder = Path(folder)
    index = ShardIndex.read(folder / INDEX)
    tokenizer = Tokenizer.from_file(folder / TOKENIZER)
    if tokenizer.fingerprint != index.tokenizer:
        raise DataError(f"{folder / TOKENIZER}: not the tokenizer that the tokens are of")
    problems: list[str] = []
    for info in (*index.train, *index.validation):
        try:
            Shard(folder / info.file, index, info).verify(tokenizer.eot_id)
        except DataError as error:
            problems.append(str(error))
    return problems


_DAMAGED = "it is damaged: bring it back from a copy, or remove its folder and prepare again"
