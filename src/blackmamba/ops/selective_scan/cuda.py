"""Launches of the kernels in CUDA C++: the passes of kernels.py with 16 states on NVIDIA GPUs.

Letters: b batch, l sequence, d d_inner, n d_state.
"""

import ctypes
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blackmamba.ops.gpu import cuda, hopper

_SOURCES = {
    "scan_forward": ("scan.cu", "scan_forward.cu"),
    "scan_forward_units": ("scan.cu", "scan_forward_units.cu"),
    "scan_backward_local": ("scan.cu", "scan_backward_local.cu"),
    "scan_backward": ("scan.cu", "scan_units.cu", "scan_backward.cu"),
}
"""Of each kernel, the files that are one text."""
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_SPAN = 16
_OF_HOPPER = 227 * 1024  # bytes of shared memory that a block may have


class _Rows(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_uint64),
        ("row", ctypes.c_int64),  # stride, in numbers
        ("token", ctypes.c_int32),  # stride, in bytes
    )


class _Sizes(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_int)
        for name in (
            *("l", "d", "l_padded", "n_chunks", "chunk", "n_blocks"),
            *("share", "shares_end"),  # in spans: of a block of threads, and of all
        )
    )


def _struct(rows: str, pointers: str) -> Any:
    """A struct of `Rows`, then pointers, then `Sizes`, as in scan.cu."""
    fields = [(name, _Rows) for name in rows.split()]
    fields += [(name, ctypes.c_uint64) for name in pointers.split()]
    return type("Arguments", (ctypes.Structure,), {"_fields_": [*fields, ("s", _Sizes)]})


_Forward = _struct("x dt z y", "A BC D bias resets first starts ends decays handed there")
_Backward = _struct(
    "x dt z grad_y grad_x grad_dt grad_z",
    "A BC D bias resets starts after partial grad_first grad_A grad_D grad_bias ends decays"
    " handed there",
)


def fits(n_padded: int, rows: list[Tensor | None], wide: list[Tensor | None]) -> bool:
    """Whether these kernels can take (b, l, d) tensors `rows` and float32 tensors `wide`."""
    first = rows[0]
    assert first is not None
    if n_padded != 16 or first.shape[2] % 8 or not cuda.runs_on(first):
        return False
    for tensor in rows:
        if tensor is None:
            continue
        aligned = tensor.data_ptr() % (4 * tensor.element_size()) == 0
        if tensor.dtype != first.dtype or not aligned or tensor.stride(2) != 1:
            return False
        if tensor.stride(0) % 4 or tensor.stride(1) % 4 or tensor.stride(1) >= 1 << 28:
            return False
    return all(t is None or (t.dtype == torch.float32 and t.data_ptr() % 16 == 0) for t in wide)


def fits_units(x: Tensor, B: Tensor, C: Tensor) -> bool:
    """Whether `scan_forward_units` can take what `fits`: matrix units read bfloat16 numbers of B
    and C whole, and a sum that is kept with 8 bits has no use for more."""
    return hopper.runs_on(x.device) and all(t.dtype == torch.bfloat16 for t in (x, B, C))


def fits_backward(rows: list[Tensor | None]) -> bool:
    """Whether the backward kernel reaches all of these (b, l, d) tensors, whose rows may have
    4 GB."""
    sizes = (t.shape[1] * t.stride(1) * t.element_size() for t in rows if t is not None)
    return max(sizes) < 1 << 32


def fits_block(name: str, channels: int, x: Tensor) -> bool:
    """Whether x's GPU has shared memory enough for a kernel's blocks of that many channels."""
    needed = _shared_bytes(name, channels // 8, x.dtype, local=False)
    if x.device.type != "cuda":
        return needed <= _OF_HOPPER
    return needed <= torch.cuda.get_device_properties(x.device).shared_memory_per_block_optin


def launch(
    name: str,
    blocks: int,
    warps: int,
    sizes: tuple[int, ...],
    tensors: dict[str, Tensor | None],
    defines: dict[str, int],
) -> None:
    """Run the kernel `name` in blocks of `warps` warps; absent tensors are null."""
    present = next(t for t in tensors.values() if t is not None)
    arguments = (_Forward if name.startswith("scan_forward") else _Backward)()
    for key, tensor in tensors.items():
        if tensor is None:
            continue
        if isinstance(getattr(arguments, key), _Rows):
            of_token = tensor.stride(1) * tensor.element_size()
            value = _Rows(tensor.data_ptr(), tensor.stride(0), of_token)
        else:
            value = tensor.data_ptr()
        setattr(arguments, key, value)
    arguments.s = _Sizes(*sizes)
    flags = {"TYPE": _TYPES[present.dtype], **_DEFAULTS, **defines}
    shared_bytes = _shared_bytes(name, warps, present.dtype, local=bool(flags["LOCAL"]))
    flags |= {"WARPS": warps, "SHARED": shared_bytes}
    units = name == "scan_forward_units"
    shared_files = (cuda.NUMBERS, cuda.HOPPER) if units else (cuda.NUMBERS,)
    sources = (*shared_files, *(Path(__file__).with_name(file) for file in _SOURCES[name]))
    kernel = cuda.kernel(sources, name, tuple(sorted(flags.items())), present.device.index, units)
    kernel.launch(blocks, 32 * warps, arguments, shared_bytes)


def _shared_bytes(name: str, warps: int, dtype: torch.dtype, *, local: bool) -> int:
    """Of a block: what each warp has of its channels in a span, and B and C of two spans."""
    if name == "scan_forward_units":
        of_turn = 4 * (4 * 3 * 80 + 16 * 40 + 2 * 8 * 40 + 16) + 2 * 8  # numbers, and two barriers
        passed_on, read_ahead = 8 * (3 * 128 + 3 * 4), 8 * 2 * 4 * 2 * 128
        return 8 * of_turn + passed_on + read_ahead
    if name == "scan_forward":
        row = 32 if warps % 4 == 0 else 48
        floats = 2 * (16 * _SPAN + 16) + (0 if local else 2 * (row * _SPAN + 8))
    elif name == "scan_backward_local":
        floats = 16 * _SPAN
    else:
        narrow = dtype == torch.bfloat16
        of_four = 2 * 512 + 256 + 256 + 256 + 64  # states, numbers, of a channel, of decays
        of_lanes = 32 * 16  # bytes of four numbers a thread
        of_warp = _SPAN // 4 * of_four + of_lanes // (2 if narrow else 1) + 64  # kept, wide
        of_warp += 8 * of_lanes  # where, sums, later
        of_warp += 0 if narrow else 4 * 4 * 2 * 8 * 20  # turned
        of_warp = math.ceil(of_warp / 128) * 128
        tile = _SPAN * 16 * (warps * 8 * dtype.itemsize // 16 | 1)
        staged, barriers = _SPAN // 4 * 5 * 2 * 16 * 4, 128
        return barriers + warps * of_warp + 2 * staged + 2 * 4 * tile
    return 4 * (warps * floats + 2 * _SPAN * 32)


_DEFAULTS = {
    "HAS_D": 0,
    "HAS_Z": 0,
    "HAS_BIAS": 0,
    "SOFTPLUS": 0,
    "HAS_SEQ": 0,
    "HAS_FIRST": 0,
    "KEEP": 0,
    "LOCAL": 0,
    "SHORT_BC": 0,
}
