"""How this machine's processor multiplies matrices of bfloat16 fastest.

Some have an instruction for pairs of bfloat16 that does twice the work of float32's, some one that
does half of it, most have none; and some have matrix units.
"""

import functools
import platform
import time
from typing import Literal

import torch

from blackmamba.ops import native

By = Literal["tiles", "pairs", "floats", "library"]
"""tiles: matrix units (AMX), by oneDNN, experts by our kernel. pairs: the instruction for pairs.
floats: float32's instructions, with bfloat16 widened on the way. library: whatever torch does."""

_FASTER = 1.4  # than float32: measured rates are about 0.5, 1 or 2 times float32's


def multiplied_by() -> By:
    """What many rows of bfloat16 are multiplied by."""
    return _by


def has_own_tiles() -> bool:
    """Whether our kernel for the matrix units was compiled, may use them, and is what is chosen."""
    return _by == "tiles" and _own_tiles


def is_faster_than_float32() -> bool:
    """Whether products of bfloat16 take clearly less time than those of float32."""
    return _by in ("tiles", "pairs") or (_by == "library" and _library_is_faster())


def describe() -> str:
    """One line for `blackmamba doctor`."""
    if _by == "tiles":
        ours = ", experts by our kernel" if _own_tiles else ""
        return f"multiplied by matrix units (AMX), in oneDNN{ours}; faster than float32"
    if _by == "library":
        return f"as torch does, {'' if _library_is_faster() else 'not '}faster than float32"
    what = "there are no instructions for pairs"
    if _ratio > 0:
        what = f"instructions for pairs are {_ratio:.2g} times as fast as those for float32"
    if _by == "pairs":
        return f"multiplied in pairs: {what}"
    return f"widened and multiplied as float32: {what}"


def _found() -> tuple[By, float]:
    """What is fastest; and how many products in pairs take the time of one of float32, or 0."""
    ratio = 0.0 if native.missing() else native.extension().pairs_against_floats()
    if _has_tiles():
        return "tiles", ratio
    if native.missing() or platform.machine() not in ("x86_64", "AMD64"):
        return "library", ratio
    return ("pairs" if ratio > _FASTER else "floats"), ratio


def _has_tiles() -> bool:
    """Whether processor and system have AMX; a machine that runs in another may hide it."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return torch.cpu._is_amx_tile_supported() and capabilities.get("amx_bf16", True)


@functools.cache
def _library_is_faster() -> bool:
    if not torch.cpu._is_avx512_bf16_supported():
        return False
    least = {torch.float32: float("inf"), torch.bfloat16: float("inf")}
    squares = {dtype: torch.ones(256, 256, dtype=dtype) for dtype in least}
    for _ in range(10):
        for dtype, square in squares.items():
            start = time.perf_counter()
            torch.mm(square, square)
            least[dtype] = min(least[dtype], time.perf_counter() - start)
    return least[torch.float32] > _FASTER * least[torch.bfloat16]


_own_tiles = native.missing() is None and native.extension().has_tiles()
_by: By
_by, _ratio = _found()  # not on first use: torch.compile could not trace that
