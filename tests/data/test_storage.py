"""Text behind URLs, packed in every way, and out of data sets."""

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pytest

from blackmamba.data import iter_documents
from blackmamba.data.storage import TextFile
from blackmamba.data.text import find_sources
from blackmamba.errors import DataError

fsspec = pytest.importorskip("fsspec", reason="fsspec is not installed")
ROWS = "".join(json.dumps({"text": f"row {i} ä", "body": f"body {i}"}) + "\n" for i in range(3000))
TEXTS = [f"row {i} ä" for i in range(3000)]


def packed_zst(content: bytes) -> bytes:
    zstandard = pytest.importorskip("zstandard", reason="zstandard is not installed")
    half = len(content) // 2  # two frames, as `cat a.zst b.zst` gives
    return b"".join(zstandard.compress(part) for part in (content[:half], content[half:]))


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": packed_zst,
}  # fmt: skip


@pytest.mark.parametrize("suffix", PACKERS)
def test_packed_files(tmp_path: Path, suffix: str):
    whole = PACKERS[suffix](ROWS.encode())
    path = tmp_path / f"rows.jsonl{suffix}"
    path.write_bytes(whole)
    assert TextFile(str(path)).kind == ".jsonl"
    assert list(iter_documents([str(path)])) == TEXTS
    assert list(iter_documents([str(tmp_path)])) == TEXTS
    path.write_bytes(whole[:-9])
    with pytest.raises(DataError, match=f"rows.jsonl{suffix}: cannot be read"):
        list(iter_documents([str(path)]))
    path.write_bytes(b"this is packed in no way at all")
    with pytest.raises(DataError, match=f"rows.jsonl{suffix}: cannot be read"):
        list(iter_documents([str(path)]))


def test_zst_without_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "a.txt.zst").write_bytes(b"x")
    monkeypatch.setitem(__import__("sys").modules, "zstandard", None)
    with pytest.raises(DataError, match=r"needs zstandard; pip install 'blackmamba\[data\]'"):
        list(iter_documents([str(tmp_path / "a.txt.zst")]))


def test_urls_are_read_like_paths(tmp_path: Path):
    memory = fsspec.filesystem("memory")
    names = {"b.txt": b"b", "a/z.jsonl.gz": gzip.compress(ROWS.encode()), "a.txt": b"a",
             ".hidden": b"no", "a/.git/config": b"no", "empty": b"", "c.bin": b"\0"}  # fmt: skip
    for name, content in names.items():
        memory.pipe(f"/corpus/{name}", content)
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    expected = list(iter_documents([str(tmp_path)]))
    assert expected == [*TEXTS, "a", "b"]
    for url in ("memory://corpus", "memory://corpus/", f"file://{tmp_path}"):
        assert list(iter_documents([url])) == expected
    assert list(iter_documents(["memory://corpus/a.txt"])) == ["a"]
    (source,) = find_sources(["memory://corpus/a.txt"])
    before = source.states()
    memory.pipe("/corpus/a.txt", b"A")
    assert source.states() != before
    with pytest.raises(DataError, match="memory://corpus/none: no such file or folder"):
        list(iter_documents(["memory://corpus/none"]))
    with pytest.raises(DataError, match="nowhere://x: cannot be read"):
        list(iter_documents(["nowhere://x"]))
    memory.rm("/corpus", recursive=True)


def test_parquet_behind_a_url(tmp_path: Path):
    arrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    from pyarrow import parquet

    parquet.write_table(arrow.table({"body": ["one", "two"]}), tmp_path / "a.parquet")
    assert list(iter_documents([f"file://{tmp_path}/a.parquet"], "body")) == ["one", "two"]


def test_another_field(tmp_path: Path):
    path = tmp_path / "rows.ndjson"
    path.write_text(ROWS)
    assert list(iter_documents([str(path)], "body"))[:2] == ["body 0", "body 1"]
    with pytest.raises(DataError, match=r'line 1: must be an object with "content"'):
        list(iter_documents([str(path)], "content"))


def test_data_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("datasets", reason="datasets is not installed")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "train.jsonl").write_text(ROWS)
    name = f"dataset:json?data_files={tmp_path}/train.jsonl"
    assert list(iter_documents([name])) == TEXTS
    assert next(iter_documents([name], "body")) == "body 0"
    (source,) = find_sources([f"dataset:{tmp_path}?split=train"])
    assert source.share is not None
    shares = [list(source.share(i, 3)) for i in range(3)]
    assert sorted(text for share in shares for text in share) == sorted(TEXTS)
    assert all(shares)
    with pytest.raises(DataError, match="no column 'content'"):
        list(iter_documents([name], "content"))
    with pytest.raises(DataError, match="none: cannot be read"):
        list(iter_documents([f"dataset:{tmp_path}/none"]))
    with pytest.raises(DataError, match="did you mean 'split'"):
        list(iter_documents(["dataset:json?spilt=train"]))


def test_data_sets_without_the_package(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(DataError, match=r"needs datasets; pip install 'blackmamba\[data\]'"):
        list(iter_documents(["dataset:json"]))
