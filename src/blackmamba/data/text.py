"""Text as a stream of documents, from files, folders and installed corpora.

A document is a row of JSON Lines or parquet (its `text`), a chapter or source file of a corpus, or
a whole file of any other kind. Memory stays flat: rows are read one by one, and a document of more
than `MAX_CHARACTERS` is given as several, cut at a blank line or line end where there is one.
"""

import codecs
import contextlib
import dataclasses
import gzip
import itertools
import json
import logging
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from functools import partial
from io import BufferedIOBase
from pathlib import Path
from typing import Any

from blackmamba.data.corpora import find_corpus
from blackmamba.errors import DataError

MAX_CHARACTERS = 2**18
_BLOCK_BYTES = 2**18  # read at once
_SNIFF_BYTES = 2**13  # read to tell text from binary
_CORPUS = "corpus:"

_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Source:
    """One thing that documents come from. Its paths' sizes and times tell whether it changed."""

    paths: tuple[Path, ...]
    documents: Callable[[], Iterator[str]]
    """Starts a new reading from the beginning."""


def iter_documents(sources: Sequence[str]) -> Iterator[str]:
    """Give the documents of all sources, in order; none is empty.

    Args:
        sources: each one of
            - a file: `.jsonl` has an object with a string `text` on each line, `.parquet` a column
              `text` (needs pyarrow), anything else is UTF-8 text. `.gz` after that is unpacked.
            - a folder: its files and those of its folders, sorted by name. Left out are hidden
              names, linked folders, empty files and binary ones (with null bytes near their
              start); all but the hidden are named in a warning.
            - "corpus:bible" or "corpus:python-stdlib", see `corpora.py`.
    Raises:
        DataError: a source is missing, empty, unreadable, binary, or not UTF-8 (with the byte), or
            a row is wrong (with the line).
    """
    for source in find_sources(sources):
        yield from source.documents()


def find_sources(names: Sequence[str]) -> list[Source]:
    """Find what `iter_documents` would read, looking no further than each file's beginning.

    Raises:
        DataError: a source is missing, empty, unreadable or binary.
    """
    if isinstance(names, str) or not names:
        raise DataError(f"text={names!r}: must be a list of at least one file, folder or corpus")
    return list(itertools.chain.from_iterable(map(_find, names)))


def sections(text: str, limit: int) -> Iterator[str]:
    """Cut `text` in pieces of at most `limit` characters which joined are `text`.

    A cut is after the last blank line in the second half of what is possible, else after the last
    line end there, else before the last space, else wherever the limit is.
    """
    start = 0
    while len(text) - start > limit:
        end = _border(text, start, start + limit)
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]


def _border(text: str, start: int, end: int) -> int:
    middle = (start + end + 1) // 2
    for mark in ("\n\n", "\n"):
        found = text.rfind(mark, middle, end)
        if found >= 0:
            return found + len(mark)
    found = text.rfind(" ", middle, end)
    return found if found >= 0 else end


# ---- finding --------------------------------------------------------------------------------


def _find(name: str) -> Iterable[Source]:
    if name.startswith(_CORPUS):
        corpus = find_corpus(name.removeprefix(_CORPUS))
        paths = tuple(corpus.files())
        return [Source(paths, partial(_corpus_documents, corpus.documents, paths))]
    path = Path(name)
    with _reading(path):
        if path.is_dir():
            return _find_in_folder(path)
        if path.is_file():
            problem = _problem(path)
            if problem:
                raise DataError(f"{path}: {problem}")
            return [_file_source(path)]
        problem = "neither a file nor a folder" if path.exists() else "no such file or folder"
        raise DataError(f"{path}: {problem}")


def _find_in_folder(folder: Path) -> list[Source]:
    found: list[Source] = []
    skipped: list[str] = []
    for path in _walk(folder):
        with _reading(path):
            problem = _problem(path)
        if problem:
            skipped.append(f"{path.relative_to(folder)} ({problem})")
        else:
            found.append(_file_source(path))
    if skipped:
        more = f" and {len(skipped) - 10} more" if len(skipped) > 10 else ""
        _logger.warning("%s: skipped %s%s", folder, ", ".join(skipped[:10]), more)
    if not found:
        raise DataError(f"{folder}: a folder without text files")
    return found


def _walk(folder: Path) -> Iterator[Path]:
    with _reading(folder):
        entries = sorted(p for p in folder.iterdir() if not p.name.startswith("."))
    for path in entries:
        if path.is_dir() and not path.is_symlink():
            yield from _walk(path)
        else:
            yield path


def _file_source(path: Path) -> Source:
    return Source((path,), partial(_file_documents, path))


def _problem(path: Path) -> str | None:
    """What makes a path no text file, as far as its beginning tells."""
    if not path.is_file():
        return "not a regular file"
    if path.stat().st_size == 0:
        return "empty file"
    if _kind(path) == ".parquet":
        return None
    with _open(path) as file:
        head = file.read(_SNIFF_BYTES)
    if not head:
        return "empty file"
    return "binary file: it has null bytes" if b"\0" in head else None


# ---- reading --------------------------------------------------------------------------------


def _corpus_documents(
    read: Callable[[Path], Iterator[str]], paths: Iterable[Path]
) -> Iterator[str]:
    for path in paths:
        with _reading(path):
            for text in read(path):
                yield from sections(text, MAX_CHARACTERS)


def _file_documents(path: Path) -> Iterator[str]:
    readers = {".jsonl": _jsonl_documents, ".parquet": _parquet_documents}
    empty = True
    with _reading(path):
        for text in readers.get(_kind(path), _plain_documents)(path):
            empty = False
            yield text
    if empty:
        raise DataError(f"{path}: it has no text")


def _plain_documents(path: Path) -> Iterator[str]:
    rest = ""
    for block in _decoded(path):
        *whole, rest = sections(rest + block, MAX_CHARACTERS)
        yield from whole
    if rest:
        yield rest


def _decoded(path: Path) -> Iterator[str]:
    """The file's text in blocks that are not empty, without a byte order mark."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = 0  # of the first byte that is not decoded yet
    at_start = True
    with _open(path) as file:
        while True:
            block = file.read(_BLOCK_BYTES)
            n_kept = len(decoder.getstate()[0])
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                raise DataError(f"{path}: not UTF-8 text at byte {offset + error.start}") from None
            offset += n_kept + len(block) - len(decoder.getstate()[0])
            if at_start and text:
                text, at_start = text.removeprefix("\ufeff"), False
            if text:
                yield text
            if not block:
                return


def _jsonl_documents(path: Path) -> Iterator[str]:
    offset = 0
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            where = f"{path}, line {number}"
            try:
                # A byte order mark may stand at the start of the file and nowhere else.
                content = line.decode("utf-8-sig" if number == 1 else "utf-8")
                row: Any = json.loads(content) if content.strip() else {"text": ""}
            except UnicodeDecodeError as error:
                at = offset + error.start
                raise DataError(f"{where}: not UTF-8 text at byte {at} of the file") from None
            except json.JSONDecodeError as error:
                raise DataError(f"{where}: not JSON: {error.msg} (column {error.colno})") from None
            except RecursionError:
                raise DataError(f"{where}: JSON nested too deeply") from None
            if not isinstance(row, dict) or "text" not in row:
                raise DataError(f'{where}: must be an object with "text", not {content[:40]!r}')
            yield from _row_text(row["text"], where)
            offset += len(line)


def _parquet_documents(path: Path) -> Iterator[str]:
    try:
        import pyarrow as arrow
        from pyarrow import parquet
    except ModuleNotFoundError:
        raise DataError(
            f"{path}: reading parquet needs pyarrow; pip install 'blackmamba[parquet]'"
        ) from None
    try:
        with parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            if "text" not in columns:
                raise DataError(f"{path}: no column 'text'; its columns are {', '.join(columns)}")
            number = 0
            for batch in file.iter_batches(batch_size=256, columns=["text"]):
                for cell in batch.column(0):
                    number += 1
                    text = cell.as_py()
                    yield from _row_text("" if text is None else text, f"{path}, row {number}")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text in column 'text' ({error.reason})") from None
    except arrow.ArrowException as error:
        reason = str(error).partition("\n")[0]
        raise DataError(f"{path}: not a readable parquet file ({reason})") from None


def _row_text(text: Any, where: str) -> Iterator[str]:
    if not isinstance(text, str):
        raise DataError(f'{where}: its "text" must be a string, not {str(text)[:40]}')
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: half a surrogate pair at character {error.start}") from None
    yield from sections(text, MAX_CHARACTERS)


def _kind(path: Path) -> str:
    """The suffix that tells the format: ".jsonl" for rows.JSONL.gz."""
    return (path.with_suffix("") if path.suffix.lower() == ".gz" else path).suffix.lower()


def _open(path: Path) -> BufferedIOBase:
    return gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb")


@contextlib.contextmanager
def _reading(path: Path) -> Generator[None]:
    """Turns what can go wrong with a file into a DataError that names it."""
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path}: cannot be read ({reason})") from None
