"""Weight files as named tensors that are read when they are copied, and let go right after.

Both kinds of file are memory-mapped. Copying a tensor into its place makes its part of the file
resident; `TensorFile.copy` hands these pages back, so that loading needs little more memory than
the model itself, even when every mapped page is counted.
"""

import ctypes
import dataclasses
import functools
import json
import mmap
import pickle
import pickletools
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from blackmamba.errors import CheckpointError

_PIECE_BYTES = 1 << 22  # of a file, resident at a time
_LISTED = 8  # names of tensors in one message
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a file's tensor belongs in a model."""

    parameter: str
    expert: int | None
    """Index into a stacked parameter, None for the whole of it."""
    shape: tuple[int, ...]
    """As it is in the file."""
    dtype: torch.dtype | None = None
    """The only one that fits; None: any of floating-point numbers."""


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
        for rows, piece in self._pieces(self.get(name).view(into.shape)):
            into[rows].copy_(piece)

    def same(self, one: str, other: str) -> bool:
        """Whether two tensors of one shape and dtype hold equal values."""
        pairs = zip(self._pieces(self.get(one)), self._pieces(self.get(other)), strict=True)
        return all(torch.equal(a, b) for (_, a), (_, b) in pairs)

    def _pieces(self, tensor: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Runs of rows; each one's part of the file is let go when the next is asked for.

        Only a contiguous tensor is known to lie within its storage, and so within the mapped file:
        an expanded one (stride 0) claims bytes that belong to whatever memory comes after.
        """
        rows = max(1, _PIECE_BYTES * len(tensor) // max(1, tensor.numel() * tensor.element_size()))
        for start in range(0, len(tensor), rows):
            piece = tensor[start : start + rows]
            yield slice(start, start + rows), piece
            if self._is_mapped and tensor.is_contiguous():
                _release(piece)

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
        odd = [name for name, t in self._tensors.items() if not _is_plain(t)]
        if odd:
            raise CheckpointError(f"{path}: not dense tensors with data: {_listing(odd)}")
        self.shapes = {name: tuple(t.shape) for name, t in self._tensors.items()}
        self.dtypes = {name: t.dtype for name, t in self._tensors.items()}

    def get(self, name: str) -> Tensor:
        return self._tensors[name]


class _Shards(TensorFile):
    """Several files as one; none of them has a name of another."""

    def __init__(self, path: Path, files: Iterable[TensorFile]):
        super().__init__(path)
        self._home: dict[str, TensorFile] = {}
        for file in files:
            self.shapes |= file.shapes
            self.dtypes |= file.dtypes
            self._home |= dict.fromkeys(file.shapes, file)

    def get(self, name: str) -> Tensor:
        return self._home[name].get(name)


def open_shards(index: Path) -> TensorFile:
    """Open the safetensors files that a model.safetensors.index.json beside them names.

    Raises:
        CheckpointError: the index or a file is missing or damaged.
    """
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        if any(Path(name).name != name or Path(name).suffix != ".safetensors" for name in names):
            raise ValueError("it names other than safetensors files beside it")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index}: damaged index of weight files ({error})") from None
    return _Shards(index, [open_tensors(index.parent / name) for name in names])


def open_tensors(path: Path) -> TensorFile:
    """Open a .safetensors file, or a file written by torch.save (flat or nested under "model").

    Raises:
        CheckpointError: it is missing, empty, truncated, of another kind, or holds objects other
            than tensors, which are not executed.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path}: the file is empty")
    return _Safetensors(path) if path.suffix == ".safetensors" else _Pickled(path)


def check_fit(file: TensorFile, places: Mapping[str, Place]) -> None:
    """Compare a file's tensors with those that a model needs.

    Raises:
        CheckpointError: names all that are missing, unexpected, of a wrong shape, or hold other
            numbers than they should.
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
    odd = [
        f"{name} {file.dtypes[name]}"
        for name in sorted(expected)
        if name in file.shapes and not _fits(file.dtypes[name], places[name].dtype)
    ]
    for what, names in (
        ("missing", missing),
        ("unexpected", extra),
        ("wrong shape:", wrong),
        ("wrong dtype:", odd),
    ):
        if names:
            problems.append(f"{what} {_listing(names)}")
    if problems:
        raise CheckpointError(f"{file.path}: does not fit its config.json; {'; '.join(problems)}")


def _fits(dtype: torch.dtype, wanted: torch.dtype | None) -> bool:
    return dtype in _FLOATS if wanted is None else dtype == wanted


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
        refused = "nsupported" in str(error) or "llowed" in str(error)
        if "Unsupported operand" in str(error):  # of a newer pickle, or of no pickle at all
            refused = _names_objects(path)
        if refused:
            raise CheckpointError(
                f"{path}: holds code or objects other than tensors; nothing of it was executed"
            ) from None
        raise CheckpointError(f"{path}: damaged, or not written by torch.save") from None
    except Exception as error:  # torch's reader raises of every kind on damaged bytes
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path}: damaged, or not written by torch.save ({reason})") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: holds a {type(found).__name__}, not tensors by name")
    return cast("dict[str, Any]", found)


def _names_objects(path: Path) -> bool:
    """Whether a file is a pickle that refers to classes or functions; nothing is unpickled."""
    try:
        with path.open("rb") as handle:
            codes = {"GLOBAL", "STACK_GLOBAL", "INST"}
            return any(op.name in codes for op, _, _ in pickletools.genops(handle))
    except Exception:  # no pickle; its reader, too, raises of every kind
        return False


def _is_plain(tensor: Tensor) -> bool:
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.layout == torch.strided
        and tensor.device.type == "cpu"
        and not tensor.is_quantized
        and not tensor.is_nested
    )


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def _release(tensor: Tensor) -> None:
    """Tell the system that a mapped tensor's pages can go; a later look reads them again."""
    advice = getattr(mmap, "MADV_DONTNEED", None)
    if advice is None:
        return
    page = mmap.PAGESIZE
    first = -(-tensor.data_ptr() // page) * page
    last = (tensor.data_ptr() + tensor.numel() * tensor.element_size()) // page * page
    if last > first:
        size = ctypes.c_size_t(last - first)
        _libc().madvise(ctypes.c_void_p(first), size, ctypes.c_int(advice))
