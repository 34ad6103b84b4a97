"""Text as a stream of documents, from files, folders, data sets and installed corpora.

A document is a row of JSON Lines, parquet or a data set (its `text`), a chapter or source file of a
corpus, or a whole file of any other kind. Memory stays flat: rows are read one by one, and a
document of more than `MAX_CHARACTERS` is given as several, cut at a blank line or line end where
there is one.
"""

import codecs
import dataclasses
import itertools
import json
import logging
import urllib.parse
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from blackmamba.config import nearest
from blackmamba.data.corpora import find_corpus
from blackmamba.data.storage import TextFile, exists, is_folder, reading, walk
from blackmamba.errors import DataError

MAX_CHARACTERS = 2**18
_BLOCK_BYTES = 2**18  # read at once
_SNIFF_BYTES = 2**13  # read to tell text from binary
_CORPUS, _DATASET = "corpus:", "dataset:"
_ROWS = {".jsonl": "json", ".ndjson": "json", ".parquet": "parquet"}

_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Source:
    """One thing that documents come from."""

    name: str
    reader: str
    """What makes documents of it: a corpus or data set by its name, a file by its suffixes."""
    documents: Callable[[], Iterator[str]]
    """Starts a new reading from the beginning."""
    states: Callable[[], list[tuple[str, int, int | str]]]
    """Name, size and time of each file in it: they tell whether it changed."""
    share: Callable[[int, int], Iterator[str]] | None = None
    """Documents of share i of n, where one source is worth dealing out among machines."""


def iter_documents(sources: Sequence[str], field: str = "text") -> Iterator[str]:
    """Give the documents of all sources, in order; none is empty.

    Args:
        sources: each one of
            - a file: `.jsonl` (or `.ndjson`) has an object with a string `text` on each line,
              `.parquet` a column `text` (needs pyarrow), anything else is UTF-8 text. `.gz`,
              `.bz2`, `.xz` or `.zst` (needs zstandard) after that is unpacked.
            - a folder: its files and those of its folders, sorted by name. Left out are hidden
              names, linked folders, empty files and binary ones (with null bytes near their
              start); all but the hidden are named in a warning.
            - a URL of either: "s3://bucket/folder"; see `storage.py`.
            - "dataset:NAME?split=train&name=en&revision=...": a Hugging Face data set by hub name
              or folder, streamed (needs datasets); "train" is the split if none is named.
            - "corpus:bible" or "corpus:python-stdlib", see `corpora.py`.
        field: what rows call their text, in the place of `text`.
    Raises:
        DataError: a source is missing, empty, unreadable, binary, or not UTF-8 (with the byte), or
            a row is wrong (with the line).
    """
    for source in find_sources(sources, field):
        yield from source.documents()


def find_sources(names: Sequence[str], field: str = "text") -> list[Source]:
    """Find what `iter_documents` would read, looking no further than each file's beginning.

    Raises:
        DataError: a source is missing, empty, unreadable or binary.
    """
    if isinstance(names, str) or not names:
        raise DataError(f"text={names!r}: must be a list of at least one file, folder or corpus")
    return list(itertools.chain.from_iterable(_find(name, field) for name in names))


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


def _find(name: str, field: str) -> Iterable[Source]:
    if name.startswith(_CORPUS):
        corpus = find_corpus(name.removeprefix(_CORPUS))
        paths = tuple(corpus.files())
        documents = partial(_corpus_documents, corpus.documents, paths)
        return [Source(name, name, documents, lambda: [TextFile(str(p)).state() for p in paths])]
    if name.startswith(_DATASET):
        return [_dataset_source(name, field)]
    with reading(name):
        if is_folder(name):
            return _find_in_folder(name, field)
        file = TextFile(name)
        if file.is_file:
            problem = _problem(file)
            if problem:
                raise DataError(f"{file}: {problem}")
            return [_file_source(file, field)]
        problem = "neither a file nor a folder" if exists(name) else "no such file or folder"
        raise DataError(f"{name}: {problem}")


def _find_in_folder(folder: str, field: str) -> list[Source]:
    found: list[Source] = []
    skipped: list[str] = []
    for file in walk(folder):
        with reading(file.name):
            problem = _problem(file)
        if problem:
            inner = file.name.removeprefix(folder.rstrip("/")).lstrip("/")
            skipped.append(f"{inner} ({problem})")
        else:
            found.append(_file_source(file, field))
    if skipped:
        more = f" and {len(skipped) - 10} more" if len(skipped) > 10 else ""
        _logger.warning("%s: skipped %s%s", folder, ", ".join(skipped[:10]), more)
    if not found:
        raise DataError(f"{folder}: a folder without text files")
    return found


def _file_source(file: TextFile, field: str) -> Source:
    documents = partial(_file_documents, file, field)
    return Source(file.name, file.kind + file.packing, documents, lambda: [file.state()])


def _problem(file: TextFile) -> str | None:
    """What makes a path no text file, as far as its beginning tells."""
    if not file.is_file:
        return "not a regular file"
    if file.n_bytes == 0:
        return "empty file"
    if file.kind == ".parquet":
        return None
    with file.open() as content:
        head = content.read(_SNIFF_BYTES)
    if not head:
        return "empty file"
    return "binary file: it has null bytes" if b"\0" in head else None


# ---- reading --------------------------------------------------------------------------------


def _corpus_documents(
    read: Callable[[Path], Iterator[str]], paths: Iterable[Path]
) -> Iterator[str]:
    for path in paths:
        with reading(str(path)):
            for text in read(path):
                yield from sections(text, MAX_CHARACTERS)


def _file_documents(file: TextFile, field: str) -> Iterator[str]:
    empty = True
    with reading(file.name):
        rows = _ROWS.get(file.kind)
        if rows == "json":
            texts = _jsonl_documents(file, field)
        elif rows == "parquet":
            texts = _parquet_documents(file, field)
        else:
            texts = _plain_documents(file)
        for text in texts:
            empty = False
            yield text
    if empty:
        raise DataError(f"{file}: it has no text")


def _plain_documents(file: TextFile) -> Iterator[str]:
    rest = ""
    for block in _decoded(file):
        *whole, rest = sections(rest + block, MAX_CHARACTERS)
        yield from whole
    if rest:
        yield rest


def _decoded(file: TextFile) -> Iterator[str]:
    """The file's text in blocks that are not empty, without a byte order mark."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = 0  # of the first byte that is not decoded yet
    at_start = True
    with file.open() as content:
        while True:
            block = content.read(_BLOCK_BYTES)
            n_kept = len(decoder.getstate()[0])
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                raise DataError(f"{file}: not UTF-8 text at byte {offset + error.start}") from None
            offset += n_kept + len(block) - len(decoder.getstate()[0])
            if at_start and text:
                text, at_start = text.removeprefix("\ufeff"), False
            if text:
                yield text
            if not block:
                return


def _jsonl_documents(file: TextFile, field: str) -> Iterator[str]:
    offset = 0
    with file.open() as lines:
        for number, line in enumerate(lines, 1):
            where = f"{file}, line {number}"
            try:
                # A byte order mark may stand at the start of the file and nowhere else.
                content = line.decode("utf-8-sig" if number == 1 else "utf-8")
                row: Any = json.loads(content) if content.strip() else {field: ""}
            except UnicodeDecodeError as error:
                at = offset + error.start
                raise DataError(f"{where}: not UTF-8 text at byte {at} of the file") from None
            except json.JSONDecodeError as error:
                raise DataError(f"{where}: not JSON: {error.msg} (column {error.colno})") from None
            except RecursionError:
                raise DataError(f"{where}: JSON nested too deeply") from None
            if not isinstance(row, dict) or field not in row:
                raise DataError(f'{where}: must be an object with "{field}", not {content[:40]!r}')
            yield from _row_text(row[field], field, where)
            offset += len(line)


def _parquet_documents(file: TextFile, field: str) -> Iterator[str]:
    try:
        import pyarrow as arrow
        from pyarrow import parquet
    except ModuleNotFoundError:
        raise DataError(
            f"{file}: reading parquet needs pyarrow; pip install 'blackmamba[parquet]'"
        ) from None
    try:
        with file.open_raw() as content, parquet.ParquetFile(content) as table:
            columns = table.schema_arrow.names
            if field not in columns:
                raise DataError(
                    f"{file}: no column {field!r}; its columns are {', '.join(columns)}"
                )
            number = 0
            for batch in table.iter_batches(batch_size=256, columns=[field]):
                for cell in batch.column(0):
                    number += 1
                    text = cell.as_py()
                    yield from _row_text(
                        "" if text is None else text, field, f"{file}, row {number}"
                    )
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 text in column {field!r} ({error.reason})") from None
    except arrow.ArrowException as error:
        reason = str(error).partition("\n")[0]
        raise DataError(f"{file}: not a readable parquet file ({reason})") from None


def _dataset_source(name: str, field: str) -> Source:
    path, _, query = name.removeprefix(_DATASET).partition("?")
    options = dict(urllib.parse.parse_qsl(query, keep_blank_values=True))
    wrong = options.keys() - {"name", "split", "revision", "data_files"}
    if wrong or not path:
        known = ("name", "split", "revision", "data_files")
        advice = nearest(min(wrong), known) if wrong else "dataset:NAME?split=train"
        raise DataError(f"{name}: not how a data set is named; {advice}")
    options.setdefault("split", "train")
    documents = partial(_dataset_documents, name, path, options, field)
    return Source(name, name, documents, lambda: [(name, 0, "")], documents)


def _dataset_documents(
    name: str, path: str, options: dict[str, str], field: str, share: int = 0, n_shares: int = 1
) -> Iterator[str]:
    try:
        import datasets
        from datasets.distributed import split_dataset_by_node
        from datasets.exceptions import DatasetsError
    except ModuleNotFoundError:
        raise DataError(
            f"{name}: reading data sets needs datasets; pip install 'blackmamba[data]'"
        ) from None
    load: Any = datasets.load_dataset
    try:
        rows: Any = load(path, streaming=True, **options)
    except (OSError, ValueError, DatasetsError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{name}: cannot be read ({reason})") from None
    if n_shares > 1:
        rows = split_dataset_by_node(rows, share, n_shares)
    number = 0
    with reading(name):
        for number, row in enumerate(rows, 1):
            if field not in row:
                raise DataError(f"{name}: no column {field!r}; its columns are {', '.join(row)}")
            text = "" if row[field] is None else row[field]
            yield from _row_text(text, field, f"{name}, row {number}")
    if number == 0 and n_shares == 1:
        raise DataError(f"{name}: it has no text")


def _row_text(text: Any, field: str, where: str) -> Iterator[str]:
    if not isinstance(text, str):
        raise DataError(f'{where}: its "{field}" must be a string, not {str(text)[:40]}')
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: half a surrogate pair at character {error.start}") from None
    yield from sections(text, MAX_CHARACTERS)
