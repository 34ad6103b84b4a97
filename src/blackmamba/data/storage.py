"""Where text lies: files on this machine and behind fsspec URLs, compressed or not.

A name with "://" is a URL that fsspec knows: s3://, gs://, hf://, https://, memory://, file://, ...
(most need a package of their own, which its error names). Anything else is a path.
"""

import bz2
import contextlib
import dataclasses
import gzip
import io
import lzma
import zlib
from collections.abc import Generator, Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

from blackmamba.errors import DataError

_URL = "://"
_UNPACK = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_PACKED = (*_UNPACK, ".zst")
_CHUNK_BYTES = 2**18


@dataclasses.dataclass(frozen=True)
class TextFile:
    """A file of text, by its path or URL."""

    name: str

    def __str__(self) -> str:
        return self.name

    @property
    def kind(self) -> str:
        """The suffix that tells the format: ".jsonl" for rows.JSONL.gz."""
        path = PurePosixPath(self.name.lower())
        return (path.with_suffix("") if path.suffix in _PACKED else path).suffix

    @property
    def packing(self) -> str:
        """The suffix that tells how it is packed: ".gz" for rows.JSONL.gz, "" if it is not."""
        suffix = PurePosixPath(self.name.lower()).suffix
        return suffix if suffix in _PACKED else ""

    @contextlib.contextmanager
    def open(self) -> Generator[IO[bytes]]:
        """Its bytes, unpacked; what can go wrong is for `reading` to tell."""
        with self.open_raw() as raw:
            if self.packing in _UNPACK:
                with _UNPACK[self.packing](raw, "rb") as content:
                    yield cast("IO[bytes]", content)
            elif self.packing == ".zst":
                with io.BufferedReader(_Unzst(raw, self.name), _CHUNK_BYTES) as content:
                    yield content
            else:
                yield raw

    def open_raw(self) -> IO[bytes]:
        """Its bytes as they lie there."""
        if _URL not in self.name:
            return Path(self.name).open("rb")
        system, path = _system(self.name)
        return cast("IO[bytes]", system.open(path, "rb"))

    @property
    def is_file(self) -> bool:
        if _URL not in self.name:
            return Path(self.name).is_file()
        system, path = _system(self.name)
        return bool(system.isfile(path))

    @property
    def n_bytes(self) -> int:
        """Its size as it lies there."""
        if _URL not in self.name:
            return Path(self.name).stat().st_size
        system, path = _system(self.name)
        return int(system.size(path) or 0)

    def state(self) -> tuple[str, int, int | str]:
        """Name, size and time (or what the storage has instead of it): changes when it changes."""
        with reading(self.name):
            if _URL not in self.name:
                path = Path(self.name)
                status = path.stat()
                return (located(self.name), status.st_size, status.st_mtime_ns)
            system, path = _system(self.name)
            return (self.name, self.n_bytes, str(system.ukey(path)))


def located(name: str) -> str:
    """The same for each spelling of a path; a URL as it is."""
    return name if not name or _URL in name else str(Path(name).resolve())


def is_folder(name: str) -> bool:
    """Whether a path or URL is a folder."""
    if _URL not in name:
        return Path(name).is_dir()
    system, path = _system(name)
    return bool(system.isdir(path))


def exists(name: str) -> bool:
    """Whether there is anything of that name."""
    if _URL not in name:
        return Path(name).exists()
    system, path = _system(name)
    return bool(system.exists(path))


def walk(folder: str) -> Iterator[TextFile]:
    """What is in a folder and its folders, sorted by name, but hidden names and linked folders."""
    if _URL not in folder:
        yield from _walk_local(Path(folder))
        return
    system, root = _system(folder)
    root = root.rstrip("/")
    with reading(folder):
        found = [str(name) for name in system.find(root)]
    for name in sorted(found, key=lambda name: name.split("/")):
        inner = name[len(root) :].lstrip("/").split("/")
        if not any(part.startswith(".") for part in inner):
            yield TextFile(str(system.unstrip_protocol(name)))


def _walk_local(folder: Path) -> Iterator[TextFile]:
    with reading(str(folder)):
        entries = sorted(p for p in folder.iterdir() if not p.name.startswith("."))
    for path in entries:
        if path.is_dir() and not path.is_symlink():
            yield from _walk_local(path)
        else:
            yield TextFile(str(path))


@contextlib.contextmanager
def reading(name: str) -> Generator[None]:
    """Turns what can go wrong with a file into a DataError that names it."""
    try:
        yield
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{name}: cannot be read ({reason})") from None


def _system(url: str) -> tuple[Any, str]:
    """The storage that a URL names, and the path in it."""
    try:
        from fsspec.core import url_to_fs
    except ModuleNotFoundError:
        raise DataError(f"{url}: URLs need fsspec; pip install fsspec") from None
    try:
        return url_to_fs(url)
    except (ImportError, ValueError) as error:  # no package for it; no such protocol
        raise DataError(f"{url}: cannot be read ({error})") from None


class _Unzst(io.RawIOBase):
    """Unpacks Zstandard, frame after frame; a cut-off file is an error, as it should be."""

    def __init__(self, raw: IO[bytes], name: str):
        try:
            import zstandard
        except ModuleNotFoundError:
            raise DataError(
                f"{name}: unpacking .zst needs zstandard; pip install 'blackmamba[data]'"
            ) from None
        self._raw = raw
        self._error = zstandard.ZstdError
        self._new = zstandard.ZstdDecompressor().decompressobj
        self._frame: Any = None
        self._packed = self._plain = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._plain:
            packed = self._packed or self._raw.read(_CHUNK_BYTES)
            self._packed = b""
            if not packed:
                if self._frame is not None:
                    raise EOFError("compressed file ended before its end-of-frame mark")
                return 0
            self._frame = self._frame or self._new()
            try:
                self._plain = self._frame.decompress(packed)
            except self._error as error:
                raise OSError(str(error)) from None
            if self._frame.eof:
                self._packed, self._frame = self._frame.unused_data, None
        n = min(len(buffer), len(self._plain))
        buffer[:n], self._plain = self._plain[:n], self._plain[n:]
        return n
