"""Token files: one split of a prepared text as flat little-endian ids, memory-mapped.

Each document is the end-of-text id and then its own ids; documents follow each other without gaps.
A prepared folder has two of them and an index that says what they should be:

    tokenizer.json   index.json   train.bin   validation.bin   validation.txt
"""

import dataclasses
import json
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypeVar

import numpy as np

from blackmamba.config import from_mapping, to_mapping
from blackmamba.data.tokenizer import Tokenizer
from blackmamba.errors import ConfigError, DataError

T = TypeVar("T")

FORMAT = 1
"""Changes with anything that makes an older folder unreadable or differently made."""
_BATCH_CHARACTERS = 2**18  # encoded at once

Dtype = Literal["uint16", "uint32"]
Tokens = np.ndarray[tuple[int], np.dtype[np.uint16 | np.uint32]]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Counts:
    """What a token file or shard holds."""

    n_tokens: int
    """Ids, the end-of-text ones included."""
    n_bytes: int
    """UTF-8 bytes of its documents."""
    n_documents: int
    max_id: int


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Index:
    """What index.json says of its folder."""

    format: int
    fingerprint: str
    """Of the settings and texts that it was made from."""
    tokenizer: str
    """`Tokenizer.fingerprint`."""
    vocab_size: int
    """`Tokenizer.n_tokens`."""
    dtype: Dtype
    train: Counts
    validation: Counts

    @classmethod
    def read(cls, path: Path) -> "Index":
        """Read an index.json.

        Raises:
            DataError: it is missing, damaged, or of another format.
        """
        return read_index(cls, path, FORMAT)

    def write(self, path: Path) -> None:
        """Write it as index.json."""
        path.write_text(json.dumps(to_mapping(self), indent=2) + "\n", encoding="utf-8")


def read_index(cls: type[T], path: Path, form: int) -> T:
    """An index.json as a dataclass that has a `format`, which must be `form`.

    Raises:
        DataError: it is missing, damaged, or of another format.
    """
    try:
        mapping: Any = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(mapping, dict) and mapping.get("format") != form:
            raise DataError(f"{path}: format {mapping.get('format')!r}, not {form}")
        return from_mapping(cls, mapping)
    except OSError as error:
        raise DataError(f"{path}: no readable index ({error.strerror})") from None
    except (ConfigError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{path}: damaged index ({error})") from None


def dtype_for(vocab_size: int) -> Dtype:
    """The smallest type of id that has room for every id below `vocab_size`."""
    return "uint16" if vocab_size <= 2**16 else "uint32"


class TokenFile:
    """The ids of one split, without reading them into memory.

    Args:
        path: a `.bin` file.
        index: of its folder.
        split: which of the index's two it is.
    Raises:
        DataError: the file is missing, or is not what the index says.
    """

    def __init__(self, path: Path, index: Index, split: Literal["train", "validation"]):
        self._index: Counts = getattr(index, split)
        dtype = np.dtype(index.dtype).newbyteorder("<")
        n_bytes = self._index.n_tokens * dtype.itemsize
        try:
            size = path.stat().st_size
        except OSError as error:
            raise DataError(f"{path}: no readable token file ({error.strerror})") from None
        if size != n_bytes or size == 0:
            raise DataError(
                f"{path}: {size} bytes, but its index says {self._index.n_tokens} ids of "
                f"{dtype.itemsize} bytes; it is damaged"
            )
        if not 0 <= self._index.max_id < index.vocab_size:
            raise DataError(
                f"{path}: ids up to {self._index.max_id}, but its tokenizer has {index.vocab_size} "
                "tokens; they do not belong together"
            )
        self.path = path
        self.tokens: Tokens = np.memmap(path, dtype, mode="r")

    @property
    def n_tokens(self) -> int:
        """Ids, the end-of-text one before each document included."""
        return self._index.n_tokens

    @property
    def n_bytes(self) -> int:
        """UTF-8 bytes of its documents, with nothing between them."""
        return self._index.n_bytes

    @property
    def n_documents(self) -> int:
        return self._index.n_documents


class TokenWriter:
    """Writes a token file document by document; a context manager. Memory stays flat."""

    def __init__(self, path: Path, tokenizer: Tokenizer):
        self._file = path.open("wb")
        self._tokenizer = tokenizer
        self._dtype = np.dtype(dtype_for(tokenizer.n_tokens)).newbyteorder("<")
        self._waiting: list[str] = []
        self._n_waiting = 0
        self._n_tokens = self._n_bytes = self._n_documents = self._max_id = 0

    def add(self, document: str) -> None:
        """Append a document."""
        self._waiting.append(document)
        self._n_waiting += len(document)
        if self._n_waiting >= _BATCH_CHARACTERS:
            self._flush()

    def finish(self) -> Counts:
        """Write what is still waiting and tell what the file holds."""
        self._flush()
        self._file.flush()
        return Counts(
            n_tokens=self._n_tokens,
            n_bytes=self._n_bytes,
            n_documents=self._n_documents,
            max_id=self._max_id,
        )

    def __enter__(self) -> "TokenWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def _flush(self) -> None:
        if not self._waiting:
            return
        joined: list[int] = []
        for document in self._tokenizer.encode_batch(self._waiting):
            joined.append(self._tokenizer.eot_id)
            joined.extend(document)
        ids = np.array(joined, self._dtype)
        self._file.write(ids.tobytes())
        self._n_tokens += len(ids)
        self._n_bytes += sum(len(text.encode()) for text in self._waiting)
        self._n_documents += len(self._waiting)
        self._max_id = max(self._max_id, int(ids.max()))
        self._waiting, self._n_waiting = [], 0
