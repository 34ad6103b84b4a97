"""Launches of products.cu: groups of rows times their expert's matrix, on NVIDIA's Hopper (9.0).

Rows are sorted by group; `ends` (e,) int32 are the groups' ends. All matrices are bfloat16, but
what `add_routed_` adds to.

Letters: t rows, e groups, m numbers of a row, n columns of a result.
"""

import ctypes
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blackmamba.ops.gpu import cuda
from blackmamba.ops.gpu import hopper as units

_SOURCES = cuda.NUMBERS, cuda.HOPPER, Path(__file__).with_name("products.cu")
_BY_ROWS, _BY_COLUMNS, _OVER_ROWS = range(3)  # FORM
_PLAIN, _GATED, _PLACED = range(3)  # MODE
_ROWS, _DEEP, _THREADS = 128, units.COLUMNS, 384
_MOST_SHARED = 227 * 1024
_FOR_ALIGNMENT = 1024
_OF_TILE = 64
"""Columns that could be multiplied in the time that a tile takes to begin and end."""


def fits(*matrices: Tensor) -> bool:
    """Whether rows and experts' matrices, and their results, can be read and written here."""
    return all(
        units.runs_on(t.device)
        and t.dtype == torch.bfloat16
        and t.shape[-1] % 8 == 0
        and t.stride(-1) == 1
        and not any(stride % 8 for stride in t.stride()[:-1])
        and t.data_ptr() % 16 == 0
        for t in matrices
    )


def gated(
    x: Tensor, w: Tensor, ends: Tensor, gelu: bool, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """act(G x) (U x) of rows x (t, m), w = [G; U] (e, 2 n, m): (t, n); if `keep`, [G x | U x]."""
    y = x.new_empty(len(x), w.shape[1] // 2)
    h = x.new_empty(len(x), w.shape[1]) if keep else None
    _launch(_BY_ROWS, _GATED, x, w, ends, y, 256, {"GELU": int(gelu), "KEEP": int(keep)}, h=h)
    return y, h


def add_routed_(
    stream: Tensor,
    rows: Tensor,
    counts: Tensor,
    order: Tensor,
    gate: Tensor,
    fc1: Tensor,
    fc2: Tensor,
    gelu: bool,
) -> None:
    """stream[order[e, j]] += gate[e, j] * expert e's output for rows[e, j], rounded to bfloat16.

    In which order an expert's rows lie does not matter to a single bit: a row's numbers are summed
    up in the same way in any place, and each is added to the stream once.

    Args:
        stream: (t, m) float32, rows one after the other.
        rows: (e, t, m): expert e's are the first counts[e] of rows[e]; the rest may be anything.
        counts: (e,) int32; t in all.
        order: (e, t) int32: rows[e, j] is that of row order[e, j] of the stream, each once.
        gate: (e, t) float32, as `order`.
        fc1: (e, 2 f, m), fc2: (e, m, f).
    """
    e, t, m = rows.shape
    hidden = rows.new_empty(t, fc2.shape[2])
    flags = {"PLACES": 1, "GELU": int(gelu)}
    _launch(_BY_ROWS, _GATED, rows.view(e * t, m), fc1, counts, hidden, 256, flags, places=t)
    flags = {"PLACES": 1, "ADD": 1, "HAS_GATE": 1}
    _launch(
        _BY_ROWS, _PLACED, hidden, fc2, counts, stream, _width(m), flags,
        places=t, order=order, gate=gate,
    )  # fmt: skip


def product(x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
    """W^T x of rows x (t, m), w (e, m, n): (t, n)."""
    y = x.new_empty(len(x), w.shape[2])
    _launch(_BY_COLUMNS, _PLAIN, x, w, ends, y, _width(w.shape[2]), {})
    return y


def placed(
    x: Tensor,
    w: Tensor,
    ends: Tensor,
    order: Tensor,
    gate: Tensor | None = None,
    *,
    by_columns: bool = False,
) -> Tensor:
    """Rows order[i] = gate[order[i]] W x_i of rows x (t, m): (t, n).

    Args:
        w: (e, n, m); `by_columns`: (e, m, n), the transposed matrices.
        order: (t,) int32, each row once.
        gate: (t,) float32.
    """
    y = x.new_empty(len(x), w.shape[2 if by_columns else 1])
    form = _BY_COLUMNS if by_columns else _BY_ROWS
    flags = {"HAS_GATE": int(gate is not None)}
    _launch(form, _PLACED, x, w, ends, y, _width(y.shape[1]), flags, order=order, gate=gate)
    return y


def gradient(x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
    """The sum of x_i w_i^T over each group's rows, x (t, m), w (t, n): (e, m, n)."""
    y = x.new_empty(len(ends), x.shape[1], w.shape[1])
    _launch(_OVER_ROWS, _PLAIN, x, w, ends, y, _width(w.shape[1]), {})
    return y


def _width(n: int) -> int:
    """Columns of a tile: those that take the least time for n."""
    return min((256, 192, 128), key=lambda wide: -(-n // wide) * (wide + _OF_TILE))


def _launch(
    form: int,
    mode: int,
    x: Tensor,
    w: Tensor,
    ends: Tensor,
    y: Tensor,
    wide: int,
    flags: dict[str, int],
    places: int = 0,
    **others: Tensor | None,
) -> None:
    t, m = x.shape
    if not t:
        y.zero_()
        return
    of_part = (_ROWS + wide) * _DEEP * 2 + 2 * 8
    depth = (_MOST_SHARED - _FOR_ALIGNMENT) // of_part
    shared = depth * of_part + _FOR_ALIGNMENT
    ends_within_part = form == _BY_COLUMNS and w.dim() == 3 and m % _DEEP != 0
    flags = dict.fromkeys(("GELU", "KEEP", "HAS_GATE", "ADD", "PLACES"), 0) | flags
    flags["APART"] = int(ends_within_part)
    flags |= {"FORM": form, "MODE": mode, "WIDE": wide, "DEPTH": depth, "SHARED": shared}
    together = _DEEP if form != _BY_ROWS else wide // 2 if mode == _GATED else wide
    arguments = _Arguments()
    of_x = _DEEP if form == _OVER_ROWS else _ROWS
    arguments.x = units.tensor_map(x.data_ptr(), x.shape, x.stride()[:-1], of_x)
    rows = w if w.dim() == 2 or ends_within_part else w.flatten(0, 1)
    arguments.w = units.tensor_map(rows.data_ptr(), rows.shape, rows.stride()[:-1], together)
    arguments.ends, arguments.y = ends.data_ptr(), y.data_ptr()
    for name, tensor in others.items():
        if tensor is not None:
            setattr(arguments, name, tensor.data_ptr())
    arguments.n_groups, arguments.n, arguments.size = len(ends), y.shape[-1], m
    arguments.places = places
    index = x.device.index
    kernel = cuda.kernel(_SOURCES, "grouped_product", tuple(sorted(flags.items())), index, True)
    blocks = torch.cuda.get_device_properties(index).multi_processor_count
    kernel.launch(blocks, _THREADS, arguments, shared)


class _Arguments(ctypes.Structure):
    _fields_: Any = (
        *((name, units.TensorMap) for name in ("x", "w")),
        *((name, ctypes.c_uint64) for name in ("ends", "y", "h", "order", "gate")),
        *((name, ctypes.c_int) for name in ("n_groups", "n", "size", "places")),
        ("_", ctypes.c_int * 2),  # whole 64 bytes, as in products.cu
    )
