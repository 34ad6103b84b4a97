"""Text from anything: documents whole and in order, mistakes named with their place."""

import gzip
import json
import logging
import os
import sys
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blackmamba.data import iter_documents
from blackmamba.data.text import MAX_CHARACTERS, sections
from blackmamba.errors import DataError


def documents(*sources: Path | str) -> list[str]:
    return list(iter_documents([str(s) for s in sources]))


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def write_rows(path: Path, *rows: object) -> Path:
    return write(path, "\n".join(json.dumps(row) for row in rows) + "\n")


def write_parquet(path: Path, **columns: list[object]) -> Path:
    arrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    from pyarrow import parquet

    parquet.write_table(arrow.table(columns), path)
    return path


# ---- what is read ---------------------------------------------------------------------------


def test_a_text_file_is_one_document_to_the_byte(tmp_path: Path):
    text = " first\r\nsecond\n\n\tÄ 漢 😀\x00 no line end"
    padding = "x" * 10_000  # a null byte far from the start is a character like any other
    assert documents(write(tmp_path / "a.txt", padding + text)) == [padding + text]


def test_sources_are_read_in_the_order_given(tmp_path: Path):
    a, b = write(tmp_path / "a", "A"), write(tmp_path / "b", "B")
    assert documents(b, a, b) == ["B", "A", "B"]


def test_byte_order_mark_is_removed_at_the_start_only(tmp_path: Path):
    assert documents(write(tmp_path / "a.txt", "\ufeffone\ufeff")) == ["one\ufeff"]
    row = '\ufeff{"text": "one\ufeff"}\n'
    assert documents(write(tmp_path / "a.jsonl", row)) == ["one\ufeff"]


def test_folder_is_read_sorted_and_says_what_it_skips(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    write(tmp_path / "b.txt", "b")
    write(tmp_path / "a" / "z.md", "z")
    write(tmp_path / "a" / "deep" / "y", "y")
    write_rows(tmp_path / "c.jsonl", {"text": "c"})
    write(tmp_path / "picture.png", b"\x89PNG\0\0")
    write(tmp_path / "empty.txt", "")
    write(tmp_path / ".hidden", "no")
    write(tmp_path / ".git" / "config", "no")
    (tmp_path / "again").symlink_to(tmp_path / "a")
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
    with caplog.at_level(logging.WARNING):
        assert documents(tmp_path) == ["y", "z", "b", "c"]
    (record,) = caplog.records
    message = record.getMessage()
    assert "picture.png (binary file" in message
    assert "empty.txt (empty file)" in message
    assert "again (not a regular file)" in message
    assert "broken (not a regular file)" in message
    assert "hidden" not in message


def test_long_list_of_skipped_files_is_cut(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    write(tmp_path / "z.txt", "text")
    for i in range(12):
        write(tmp_path / f"{i:02}.bin", b"\0")
    with caplog.at_level(logging.WARNING):
        assert documents(tmp_path) == ["text"]
    assert caplog.text.count("binary file") == 10
    assert "and 2 more" in caplog.text


def test_jsonl_gives_a_document_a_row(tmp_path: Path):
    path = write_rows(tmp_path / "a.JSONL", {"text": "one\ntwo", "id": 1}, {"text": ""})
    with path.open("a") as file:
        file.write('\n  \n{"text": "\\ud83d\\ude00"}')
    assert documents(path) == ["one\ntwo", "😀"]


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.txt.gz", "plain"), ("a.jsonl.gz", '{"text": "plain"}\n'), ("a.gz", "plain")],
)
def test_gz_is_unpacked(tmp_path: Path, name: str, content: str):
    path = write(tmp_path / name, gzip.compress(content.encode()))
    assert documents(path) == documents(tmp_path) == ["plain"]


def test_parquet_gives_a_document_a_row(tmp_path: Path):
    path = write_parquet(tmp_path / "a.parquet", id=[1, 2, 3, 4], text=["one", None, "", "two"])
    assert documents(path) == documents(tmp_path) == ["one", "two"]


def test_long_documents_are_cut_at_line_ends_and_nothing_is_lost(tmp_path: Path):
    lines = "".join(f"line {i} of a long text, 漢\n" for i in range(30_000))
    from_text = documents(write(tmp_path / "a.txt", lines))
    from_rows = documents(write_rows(tmp_path / "a.jsonl", {"text": lines}))
    assert from_text == from_rows
    assert "".join(from_text) == lines
    assert len(from_text) > 2
    assert all(len(d) <= MAX_CHARACTERS and d.endswith("\n") for d in from_text)


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, suffix: str):
    line = "some words to fill a line with, again and again\n" * 20
    row = line if suffix == ".txt" else json.dumps({"text": line}) + "\n"
    path = write(tmp_path / f"a{suffix}", row * 16_000)
    tracemalloc.start()
    try:
        n = sum(len(text) for text in iter_documents([str(path)]))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert n == 16_000 * len(line)
    assert peak < path.stat().st_size / 4


@given(st.text(alphabet="ab \n", max_size=200), st.integers(1, 20))
@settings(max_examples=200, deadline=None)
def test_sections_are_the_text_in_pieces(text: str, limit: int):
    pieces = list(sections(text, limit))
    assert "".join(pieces) == text
    assert all(0 < len(p) <= limit for p in pieces)


def test_sections_prefer_blank_lines_then_lines_then_words():
    assert list(sections("aaaaa\n\nb\nccc", 10)) == ["aaaaa\n\n", "b\nccc"]
    assert list(sections("aaaaa\nb ccc", 10)) == ["aaaaa\n", "b ccc"]
    assert list(sections("aaaaa b ccc", 10)) == ["aaaaa b", " ccc"]
    assert list(sections("aaaaabbbccc", 10)) == ["aaaaabbbcc", "c"]


# ---- mistakes -------------------------------------------------------------------------------


def assert_fails(source: Path | str, *parts: str) -> None:
    with pytest.raises(DataError) as caught:
        documents(source)
    message = str(caught.value)
    assert "\n" not in message
    for part in (str(source), *parts):
        assert part in message


def test_missing_or_no_file(tmp_path: Path):
    assert_fails(tmp_path / "none.txt", "no such file or folder")
    os.mkfifo(tmp_path / "pipe")
    assert_fails(tmp_path / "pipe", "neither a file nor a folder")


@pytest.mark.parametrize("sources", [[], "some/path.txt"])
def test_sources_must_be_a_list(sources: list[str] | str):
    with pytest.raises(DataError, match="must be a list"):
        next(iter_documents(sources))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", b""),
        ("a.jsonl", b""),
        ("a.parquet", b""),
        ("a.txt.gz", gzip.compress(b"", mtime=0)),
    ],
)
def test_empty_file(tmp_path: Path, name: str, content: bytes):
    assert_fails(write(tmp_path / name, content), "empty file")


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.txt", b"\xef\xbb\xbf"), ("a.jsonl", b"\n\n"), ("b.jsonl", b'{"text": ""}\n')],
)
def test_file_without_text(tmp_path: Path, name: str, content: bytes):
    assert_fails(write(tmp_path / name, content), "it has no text")


def test_folder_without_text(tmp_path: Path):
    write(tmp_path / "folder" / "a.bin", b"\0")
    assert_fails(tmp_path / "folder", "without text files")


@pytest.mark.parametrize("content", [b"abc\0def", "text".encode("utf-16")])
def test_binary_file_named_directly(tmp_path: Path, content: bytes):
    assert_fails(write(tmp_path / "a.txt", content), "binary file", "null bytes")


@pytest.mark.parametrize("block", [1, 2, 3, 7, 2**18])
@pytest.mark.parametrize(
    ("content", "at"),
    [
        (b"caf\xe9 au lait", 3),
        ("ä漢".encode() + b"\xff", 5),
        ("aä漢".encode()[:-1], 3),  # cut off in the middle of a character
        (b"\xef\xbb\xbfa\x80", 4),
    ],
)
def test_not_utf8_names_the_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, at: int, block: int
):
    monkeypatch.setattr("blackmamba.data.text._BLOCK_BYTES", block)
    assert_fails(write(tmp_path / "a.txt", content), f"not UTF-8 text at byte {at}")


def test_not_utf8_in_a_folder_is_no_less_an_error(tmp_path: Path):
    path = write(tmp_path / "a" / "latin1.txt", b"caf\xe9")
    with pytest.raises(DataError, match="byte 3") as caught:
        documents(tmp_path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("row", "parts"),
    [
        (b'{"text": "a"', ["not JSON", "column"]),
        (b"text", ["not JSON"]),
        (b'{"txt": "a"}', ['must be an object with "text"', "txt"]),
        (b'{"text": 3}', ['its "text" must be a string, not 3']),
        (b'{"text": null}', ['its "text" must be a string, not None']),
        (b'["text"]', ['must be an object with "text"']),
        (b'"text"', ['must be an object with "text"']),
        (b"null", ['must be an object with "text"']),
        (b'{"text": "\xe9"}', ["not UTF-8 text at byte 27 of the file"]),
        (b'{"text": "\\ud800"}', ["surrogate", "character 0"]),
        (b"[" * 200_000, ["nested too deeply"]),
    ],
    ids=range(11),
)
def test_wrong_row_names_file_and_line(tmp_path: Path, row: bytes, parts: list[str]):
    path = write(tmp_path / "a.jsonl", b'{"text": "fine"}\n' + row + b"\n")
    assert_fails(path, "line 2", *parts)


@pytest.mark.parametrize("suffix", [".txt.gz", ".jsonl.gz"])
def test_damaged_gz(tmp_path: Path, suffix: str):
    whole = gzip.compress(b'{"text": "some text"}\n' * 5000)
    assert_fails(write(tmp_path / f"short{suffix}", whole[:-20]), "cannot be read")
    assert_fails(write(tmp_path / f"no{suffix}", b"this is no gzip"), "cannot be read")
    wrong = bytearray(whole)
    wrong[40:80] = b"\xff" * 40
    assert_fails(write(tmp_path / f"wrong{suffix}", bytes(wrong)), "cannot be read")


def test_wrong_parquet(tmp_path: Path):
    path = write_parquet(tmp_path / "a.parquet", body=["one"])
    assert_fails(path, "no column 'text'", "body")
    assert_fails(write_parquet(tmp_path / "b.parquet", text=[1, 2]), "row 1", "not 1")
    assert_fails(write(tmp_path / "c.parquet", b"PAR1 nothing"), "not a readable parquet file")
    whole = write_parquet(tmp_path / "d.parquet", text=["one"] * 100).read_bytes()
    assert_fails(write(tmp_path / "e.parquet", whole[:-10]), "not a readable parquet file")


def test_parquet_text_that_is_not_utf8(tmp_path: Path):
    arrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    from pyarrow import parquet

    offsets, data = arrow.array([0, 4], arrow.int32()).buffers()[1], arrow.py_buffer(b"caf\xe9")
    text = arrow.StringArray.from_buffers(1, offsets, data)
    parquet.write_table(arrow.table({"text": text}), tmp_path / "a.parquet")
    assert_fails(tmp_path / "a.parquet", "not UTF-8")


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert_fails(write(tmp_path / "a.parquet", b"PAR1"), "pip install 'blackmamba[parquet]'")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root reads every file")
def test_unreadable_file(tmp_path: Path):
    path = write(tmp_path / "a.txt", "text")
    path.chmod(0)
    assert_fails(path, "Permission denied")


def test_file_that_fails_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = write(tmp_path / "a.txt", "text")

    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "open", fail)
    assert_fails(path, "Input/output error")
