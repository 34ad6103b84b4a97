"""Files that are whole or absent: written under a temporary name, synced, then renamed.

A run that is killed half-way through a write, or a disk that fills up, leaves the old file.
"""

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Generator
from pathlib import Path


@contextlib.contextmanager
def atomic_file(path: Path) -> Generator[Path]:
    """Give a temporary path beside `path`; when the block ends well it becomes `path`.

    Args:
        path: the final name; its folder is made if it is missing.
    Yields:
        The path to write to. On any exception it is removed and `path` is untouched.
    Raises:
        OSError: as the writing code or the rename raised it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        settle(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Generator[Path]:
    """Give a temporary folder beside `path`; when the block ends well it becomes `path`.

    An older folder of that name is moved aside first and removed after: a half-written folder never
    carries the final name.

    Raises:
        OSError: as the writing code or the rename raised it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    try:
        yield temporary
        temporary.chmod(0o777 & ~_umask())
        for file in temporary.rglob("*"):
            if file.is_file():
                sync(file)
        sync(temporary)
        if path.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".old", dir=path.parent))
            os.replace(path, old / path.name)
            os.replace(temporary, path)
            shutil.rmtree(old)
        else:
            os.replace(temporary, path)
        sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8 to `path`, whole or not at all."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def settle(temporary: Path) -> None:
    """Give a finished temporary file the permissions of any other and put it on disk."""
    temporary.chmod(0o666 & ~_umask())
    sync(temporary)


def sync(path: Path) -> None:
    """Ask the system to put a file's content or a folder's entries on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
