"""Launches of few.cu: a matrix times the vectors of a few sequences, for recording.

Letters: b sequences, k columns of the matrix, n rows of it (or of one of a pair), e experts, c
channels of the convolution, t its taps.
"""

import ctypes
import dataclasses
import itertools
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from blackmamba.ops import gpu
from blackmamba.ops.gpu import cuda, tuning

MOST = 16
"""Sequences that the kernel is made for."""
MOST_EXPERTS = 32
"""Of which a block keeps a bit each."""
WIDEST = 4096
"""Columns, of which all blocks hold a part of each vector."""
_HOPPERS_SHARED = 227 * 1024  # bytes that a block may have
_RESERVED = 1024  # besides, of each block
_REGISTERS = 65_536
_SOURCES = (cuda.NUMBERS, Path(__file__).with_name("few.cu"))


@dataclasses.dataclass(frozen=True)
class Norm:
    """RMSNorm of the vectors before they are multiplied."""

    weight: Tensor
    """(k,) float32."""
    eps: float


@dataclasses.dataclass(frozen=True)
class Conv:
    """The causal convolution and SiLU of the first half of the rows."""

    weight: Tensor
    """(c, t) float32."""
    bias: Tensor
    """(c,) float32."""
    state: Tensor
    """(b, c, t - 1) float32, which moves on."""


@dataclasses.dataclass(frozen=True)
class Routed:
    """Each sequence is multiplied with the matrix of its expert."""

    ids: Tensor
    """(b,) int64."""
    gate: Tensor
    """(b,) float32, of what is added."""


@dataclasses.dataclass(frozen=True)
class FewCut:
    """How a product is cut into blocks of threads."""

    tiles: int
    """Of 8 rows, or pairs of rows."""
    warps: int
    """Among which the columns are dealt out."""
    stages: int
    """Items that are on their way from memory at once."""
    blocks: int
    """Of a multiprocessor, at most."""


class _Arguments(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in (
            "v", "weight", "norm_weight", "out", "ids", "gate", "conv_weight", "conv_bias",
            "conv_state",
        )), ("v_stride", ctypes.c_int), ("out_stride", ctypes.c_int), ("eps", ctypes.c_float),
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _Launch:
    kernel: cuda.Kernel
    blocks: int
    threads: int
    arguments: _Arguments
    shared_bytes: int
    overlap: bool
    tensors: tuple[Tensor | None, ...]
    """That the arguments point to."""

    def __call__(self) -> None:
        self.kernel.launch(
            self.blocks, self.threads, self.arguments, self.shared_bytes, self.overlap
        )


def fits(weight: Tensor) -> bool:
    """Whether the kernel can read a matrix, or several: bfloat16, rows of whole 16 bytes, on a GPU
    that lets kernels overlap: it was measured on none other."""
    return (
        cuda.runs_on(weight)
        and (gpu.can_overlap() or not weight.is_cuda)
        and weight.dtype == torch.bfloat16
        and weight.is_contiguous()
        and weight.shape[-1] % 8 == 0
        and weight.shape[-1] <= WIDEST
        and weight.data_ptr() % 16 == 0
    )


def launcher(
    v: Tensor,
    weight: Tensor,
    out: Tensor,
    *,
    add: bool = False,
    norm: Norm | None = None,
    conv: Conv | None = None,
    routed: Routed | None = None,
    activation: str | None = None,
    cut: FewCut | None = None,
) -> Callable[[], None]:
    """A call that launches out = weight v; the tensors have to stay where they are.

    Args:
        v: (b, k), of whose rows each lies in one piece, at whole 16 bytes: bfloat16, or float32 if
            there is a norm.
        weight: (n, k) or (e, n, k) bfloat16, n twice as many where there is an activation; `fits`.
        out: (b, n) bfloat16 or float32, of whose rows each lies in one piece.
        add: to what `out` is, times the gate if `routed`. No more than that, without conv and
            activation.
        activation: "silu" or "gelu": rows are pairs, of which out = activation(g) u.
        cut: other than the usual one, or what `blackmamba tune` found.
    """
    b, width = v.shape
    rows = out.shape[1]
    pairs = 1 if activation is None else 2
    vectors = torch.bfloat16 if norm is None else torch.float32
    assert v.dtype == vectors
    assert b <= MOST
    assert routed is None or len(weight) <= MOST_EXPERTS
    assert v.stride(1) == out.stride(1) == 1
    assert v.data_ptr() % 16 == 0
    assert v.stride(0) * v.element_size() % 16 == 0
    assert weight.shape[-2:] == (pairs * rows, width)
    assert fits(weight)
    form = 1 if conv is not None else 2 if add else 3 if pairs == 2 else 0
    n_experts = len(weight) if routed is not None else 1
    pointers = [
        v, weight, None if norm is None else norm.weight, out,
        *((routed.ids, routed.gate) if routed is not None else (None, None)),
        *((conv.weight, conv.bias, conv.state) if conv is not None else (None,) * 3),
    ]  # fmt: skip
    arguments = _Arguments(
        *(None if t is None else t.data_ptr() for t in pointers),
        v.stride(0),
        out.stride(0),
        0.0 if norm is None else norm.eps,
    )
    defines = {
        "WIDTH": width, "ROWS": rows, "TOKENS": b, "NORM": norm is not None,
        "ROUTED": routed is not None, "FORM": form,
        "WIDE": out.dtype == torch.float32, "GELU": activation == "gelu",
        "TAPS": 2 if conv is None else conv.weight.shape[1], "OVERLAP": gpu.can_overlap(),
    }  # fmt: skip

    def cut_launcher(cut: FewCut) -> Callable[[], None]:
        items = min(n_experts, b) * -(-rows // (8 * cut.tiles))
        shared_bytes = _shared_bytes(cut, width, b, pairs)
        own = {
            "TILES": cut.tiles, "WARPS": cut.warps, "STAGES": cut.stages, "SHARED": shared_bytes,
        }  # fmt: skip
        numbers = tuple((name, int(value)) for name, value in (defines | own).items())
        return _Launch(
            cuda.kernel(_SOURCES, "few_product", numbers, v.device.index or 0),
            min(items, cut.blocks * gpu.processors(v)),
            32 * cut.warps,
            arguments,
            shared_bytes,
            bool(defines["OVERLAP"]),
            tuple(pointers),
        )

    if cut is None:
        most = most_shared(v)
        cut = tuning.pick(
            "few_product",
            f"b={b} rows={rows} width={width} e={n_experts} form={form}",
            usual_cut(rows, width, b, pairs, most),
            lambda: cuts(width, b, pairs, most),
            lambda cut: cut_launcher(cut)(),
        )
    return cut_launcher(cut)


def cuts(width: int, b: int, pairs: int, most: int) -> list[FewCut]:
    """What `blackmamba tune` tries, where blocks may have so many bytes of shared memory."""
    return [
        cut
        for tiles in (1, 2)
        for warps in (8, 16)
        for stages in (1, 2, 3)
        for blocks in (1, 2)
        if _fits(cut := FewCut(tiles, warps, stages, blocks), width, b, pairs, most)
    ]


def usual_cut(rows: int, width: int, b: int, pairs: int, most: int) -> FewCut:
    """Chosen by measuring on an H200, where shared memory suffices."""
    tiles = 2 if pairs == 1 and rows >= 512 else 1
    tried = itertools.product((8, 16), (2, 1), (tiles, 1), (2, 1))
    usual = (FewCut(tiles, warps, stages, blocks) for warps, stages, tiles, blocks in tried)
    return next(cut for cut in usual if _fits(cut, width, b, pairs, most))


def most_shared(tensor: Tensor) -> int:
    """Bytes of shared memory that a block may have on the tensor's GPU."""
    if tensor.device.type != "cuda":
        return _HOPPERS_SHARED
    return torch.cuda.get_device_properties(tensor.device).shared_memory_per_block_optin


def _fits(cut: FewCut, width: int, b: int, pairs: int, most: int) -> bool:
    """Whether a multiprocessor has shared memory and registers for it."""
    registers = 8 * _steps(cut, width) + 4 * pairs * cut.tiles + 48
    return (
        cut.blocks * (_shared_bytes(cut, width, b, pairs) + _RESERVED) <= most + _RESERVED
        and cut.blocks * 32 * cut.warps * registers <= _REGISTERS
    )


def _steps(cut: FewCut, width: int) -> int:
    """Times 32 columns of a warp."""
    return math.ceil(width / (32 * cut.warps))


def _shared_bytes(cut: FewCut, width: int, b: int, pairs: int) -> int:
    ring = cut.stages * _steps(cut, width) * pairs * cut.tiles * 32 * 16
    of_warp = ring + 2 * 4 * 16 * (8 * pairs * cut.tiles + 1) + 4 * b
    return -(-cut.warps * of_warp // 16) * 16
