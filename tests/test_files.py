"""Files are whole or absent."""

import errno
import os
from pathlib import Path

import pytest

from blackmamba.files import atomic_file, atomic_folder, write_text


def test_file_appears_whole_with_ordinary_permissions(tmp_path: Path):
    plain = tmp_path / "plain"
    plain.write_text("x")
    write_text(tmp_path / "new" / "a.txt", "text")
    assert (tmp_path / "new" / "a.txt").read_text() == "text"
    assert (tmp_path / "new" / "a.txt").stat().st_mode == plain.stat().st_mode


def test_failed_write_leaves_the_old_file(tmp_path: Path):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def fail() -> None:
        with atomic_file(path) as temporary:
            temporary.write_text("half")
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        fail()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_folder_replaces_the_old_one_whole(tmp_path: Path):
    path = tmp_path / "folder"
    for content in ("one", "two"):
        with atomic_folder(path) as temporary:
            (temporary / content).write_text(content)
            (temporary / "sub").mkdir()
            (temporary / "sub" / "deep").write_text("x")
    assert sorted(os.listdir(path)) == ["sub", "two"]
    assert os.listdir(tmp_path) == ["folder"]


def test_failed_folder_leaves_the_old_one(tmp_path: Path):
    path = tmp_path / "folder"
    with atomic_folder(path) as temporary:
        (temporary / "a").write_text("old")

    def fail() -> None:
        with atomic_folder(path) as temporary:
            (temporary / "a").write_text("half")
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        fail()
    assert (path / "a").read_text() == "old"
    assert os.listdir(tmp_path) == ["folder"]
