"""Weight files as named tensors that are read when they are copied, and let go right after.

Both kinds of file are memory-mapped. Copying a tensor into its place makes its part of the file
resident; `TensorFile.copy` hands these pages back, so that loading needs little more memory than
the model itself, even when every mapped page is counted.
"""

import ctypes
import ctypes.util
import dataclasses
import mmap
import pickle
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from blackmamba.errors import CheckpointError

_PIECE_BYTES = 1 << 22  # of a file, resident at a time
_LISTED = 8  # names of tensors in one message


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a file's tensor belongs in a model."""

    parameter: str
    expert: int | None
    """Index into a stacked parameter, None for the whole of it."""
    shape: tuple[int, ...]
    """As it is in the file."""


class TensorFile:
    """The tensors of one file.

    Attributes:
        path: the file.
        shapes: by name.
        dtypes: by name.
    """

    def __init__(self, path: Path):
        self.path = path
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}

    def get(self, name: str) -> Tensor:
        """The tensor, mapped where the file can be."""
        raise AssertionError("a kind of file defines this")

    def copy(self, name: str, into: Tensor) -> None:
        """Copy a tensor into memory of the same shape, converting dtype and device on the way."""
        tensor = self.get(name).view(into.shape)
        if not self._is_mapped or tensor.dim() == 0:
            into.copy_(tensor)
            return
        rows = max(1, _PIECE_BYTES * len(tensor) // max(1, tensor.numel() * tensor.element_size()))
        for source, target in zip(tensor.split(rows), into.split(rows), strict=True):
            target.copy_(source)
            _release(source)

    _is_mapped = True


class _Safetensors(TensorFile):
    def __init__(self, path: Path):
        super().__init__(path)
        try:
            self._file = cast(Any, safe_open(path, framework="pt"))
            for name in self._file.keys():  # noqa: SIM118 # it is no mapping
                self.shapes[name] = tuple(self._file.get_slice(name).get_shape())
                self.dtypes[name] = self._file.get_tensor(name).dtype
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(f"{path}: truncated, or no safetensors file ({error})") from None

    def get(self, name: str) -> Tensor:
        return self._file.get_tensor(name)


class _Pickled(TensorFile):
    """A torch.save file; nothing but tensors is unpickled."""

    def __init__(self, path: Path):
        super().__init__(path)
        self._is_mapped = zipfile.is_zipfile(path)
        found = _unpickle(path, self._is_mapped)
        nested = found.get("model")
        if isinstance(nested, Mapping):
            found = cast("dict[str, Any]", nested)
        self._tensors = {
            str(name): value for name, value in found.items() if isinstance(value, Tensor)
        }
        self.shapes = {name: tuple(t.shape) for name, t in self._tensors.items()}
        self.dtypes = {name: t.dtype for name, t in self._tensors.items()}

    def get(self, name: str) -> Tensor:
        return self._tensors[name]


def open_tensors(path: Path) -> TensorFile:
    """Open a .safetensors file, or a file written by torch.save (flat or nested under "model").

    Raises:
        CheckpointError: it is missing, empty, truncated, of another kind, or holds objects other
        than
            tensors, which are not executed.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path}: the file is empty")
    return _Safetensors(path) if path.suffix == ".safetensors" else _Pickled(path)


def check_fit(file: TensorFile, places: Mapping[str, Place]) -> None:
    """Compare a file's tensors with those that a model needs.

    Raises:
        CheckpointError: names all that are missing, unexpected or of a wrong shape.
    """
    problems: list[str] = []
    expected = {name: place.shape for name, place in places.items()}
    missing = sorted(expected.keys() - file.shapes.keys())
    extra = sorted(file.shapes.keys() - expected.keys())
    wrong = [
        f"{name} {file.shapes[name]} instead of {shape}"
        for name, shape in sorted(expected.items())
        if name in file.shapes and file.shapes[name] != shape
    ]
    for what, names in (("missing", missing), ("unexpected", extra), ("wrong shape:", wrong)):
        if names:
            problems.append(f"{what} {_listing(names)}")
    if problems:
        raise CheckpointError(f"{file.path}: does not fit its config.json; {'; '.join(problems)}")


def _listing(names: Iterable[str]) -> str:
    every = list(names)
    more = len(every) - _LISTED
    return ", ".join(every[:_LISTED]) + (f" and {more} more" if more > 0 else "")


def _unpickle(path: Path, is_zip: bool) -> dict[str, Any]:
    with path.open("rb") as handle:
        start = handle.read(2)
    if start == b"PK" and not is_zip:
        raise CheckpointError(f"{path}: truncated, the end of the file is missing")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols; what counts is raised
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        if "nsupported" in str(error) or "llowed" in str(error):
            raise CheckpointError(
                f"{path}: holds code or objects other than tensors; nothing of it was executed"
            ) from None
        raise CheckpointError(f"{path}: damaged, or not written by torch.save") from None
    except (RuntimeError, EOFError, KeyError, ValueError, IndexError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path}: damaged, or not written by torch.save ({reason})") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: holds a {type(found).__name__}, not tensors by name")
    return cast("dict[str, Any]", found)


def _release(tensor: Tensor) -> None:
    """Tell the system that a mapped tensor's pages can go; a later look reads them again."""
    advice = getattr(mmap, "MADV_DONTNEED", None)
    if advice is None or tensor.device.type != "cpu":
        return
    page = mmap.PAGESIZE
    first = -(-tensor.data_ptr() // page) * page
    last = (tensor.data_ptr() + tensor.numel() * tensor.element_size()) // page * page
    if last > first:
        libc = ctypes.CDLL(ctypes.util.find_library("c"), use_errno=True)
        libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), ctypes.c_int(advice))
