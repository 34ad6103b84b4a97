"""Matrices stored in 8 or 4 bits a number, with one scale for each group of columns of a row.

Letters: e experts, o rows (outputs), i columns (inputs), s group size, g = ceil(i / s) groups.

    int8    data (..., o, i) int8                  w = data * scale; data is -127 .. 127
    int4    data (..., o, 16 ceil(i / 32)) uint8   w = (code - 8) * scale; code is 0 .. 15
    both    scales (..., o, g) bfloat16, negative ones included; the last group may be shorter

Int4 packs each run of 32 columns into 16 bytes: byte j of a run holds the code of its column j in
the low half and that of its column j + 16 in the high half. Columns beyond i have code 8, a zero.

A scale is rounded to bfloat16 before the numbers are, so that its rounding costs no accuracy, and
bfloat16 has float32's range, so that no scale is lost.

Source: the search for a scale follows the idea of choosing clipping by least squared error, as in
Banner et al. 2019 (arXiv 1810.05723); grouping as in Dettmers and Zettlemoyer 2023 (arXiv
2212.09720).
"""

import dataclasses

import torch
from torch import Tensor

from blackmamba.errors import ConfigError, InputError

GROUP_SIZES = (32, 64, 128)
BITS = (8, 4)
_RUN = 32  # columns of int4 that share 16 bytes
_CHUNK = 1 << 20  # numbers quantised at a time: their copies stay in the processor's cache
# Where the largest number of a group may come to lie, in steps from zero: -8 .. 7 are there.
_INT4_PEAKS = (-9.0, -8.5, -8.0, -7.5, -7.0, 6.5, 7.0, 7.5, 8.0, 8.5)


@dataclasses.dataclass(frozen=True)
class QuantizedWeight:
    """A matrix (o, i), or several of one shape (e, o, i); see the head of this file."""

    data: Tensor
    scales: Tensor
    group_size: int
    n_columns: int
    """i."""

    @property
    def bits(self) -> int:
        return 8 if self.data.dtype == torch.int8 else 4

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the matrix that it stands for."""
        return (*self.data.shape[:-1], self.n_columns)

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + self.scales.nbytes

    def __getitem__(self, index: int | slice | Tensor) -> "QuantizedWeight":
        """Of the first dimension: one expert, some rows, or those of some ids."""
        return dataclasses.replace(self, data=self.data[index], scales=self.scales[index])


def storage_shapes(
    shape: tuple[int, ...], bits: int, group_size: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of `data` and `scales` for matrices of `shape` (..., o, i).

    Raises:
        ConfigError: no such bits or group size.
    """
    check_scheme(bits, group_size)
    *rows, i = shape
    width = i if bits == 8 else _RUN // 2 * -(-i // _RUN)
    return (*rows, width), (*rows, -(-i // group_size))


def storage_dtype(bits: int) -> torch.dtype:
    """Of `data`."""
    return torch.int8 if bits == 8 else torch.uint8


def check_scheme(bits: int, group_size: int) -> None:
    """Raises: ConfigError: no such bits or group size."""
    if bits not in BITS:
        raise ConfigError(f"bits={bits!r}: must be 8 or 4")
    if group_size not in GROUP_SIZES:
        raise ConfigError(f"group_size={group_size!r}: must be {', '.join(map(str, GROUP_SIZES))}")


@torch.no_grad()
def quantize_weight(weight: Tensor, bits: int, group_size: int) -> QuantizedWeight:
    """The matrix in 8 or 4 bits.

    Int8 is off by half a step at most, 1/254 of the largest number in a group (a little more where
    the rounded scale is too small for it); int4 takes of several scales the one of least squared
    error, which may cut off the largest numbers.

    Args:
        weight: (..., o, i), any floating-point dtype, at least 2 dimensions.
        bits: 8 or 4.
        group_size: 32, 64 or 128 columns share a scale; where it does not divide i, the last group
            is shorter.
    Raises:
        ConfigError: no such bits or group size.
        InputError: fewer than 2 dimensions, no floating-point dtype, or NaN or infinity in it.
    """
    shapes = storage_shapes(tuple(weight.shape), bits, group_size)
    if weight.dim() < 2 or not weight.dtype.is_floating_point:
        raise InputError(
            f"quantize_weight: weight has shape {tuple(weight.shape)}, {weight.dtype}; must be "
            "(..., out, in) of a floating-point dtype"
        )
    i = weight.shape[-1]
    data = torch.empty(shapes[0], dtype=storage_dtype(bits), device=weight.device)
    scales = torch.empty(shapes[1], dtype=torch.bfloat16, device=weight.device)
    rows, data_rows, scale_rows = (
        t.view(-1, t.shape[-1]) for t in (weight.contiguous(), data, scales)
    )
    step = max(1, _CHUNK // max(1, i))
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        w = rows[part].float()
        if not w.isfinite().all():
            raise InputError("quantize_weight: weight holds NaN or infinity")
        groups = torch.nn.functional.pad(w, (0, -i % group_size)).unflatten(-1, (-1, group_size))
        scale, whole = (_int8 if bits == 8 else _int4)(groups)
        scale_rows[part] = scale
        whole = whole.flatten(-2)[:, :i]
        data_rows[part] = whole.to(torch.int8) if bits == 8 else _pack(whole)
    return QuantizedWeight(data, scales, group_size, i)


def dequantize(weight: QuantizedWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """The matrix (..., o, i) that `weight` stands for; exact in float32 and wider."""
    wide = torch.promote_types(dtype, torch.float32)
    numbers = weight.data if weight.bits == 8 else _unpack(weight.data, weight.n_columns)
    scales = weight.scales.to(wide)
    if weight.n_columns % weight.group_size == 0:
        groups = numbers.unflatten(-1, (scales.shape[-1], weight.group_size)).to(wide)
        return groups.mul_(scales[..., None]).flatten(-2).to(dtype)
    each = scales.repeat_interleave(weight.group_size, dim=-1)[..., : weight.n_columns]
    return (numbers.to(wide) * each).to(dtype)


# ---- groups (rows, g, s) to scales (rows, g) and whole numbers ------------------------------


def _int8(groups: Tensor) -> tuple[Tensor, Tensor]:
    scale = (groups.abs().amax(-1) / 127).bfloat16()
    return scale, _rounded(groups, scale, -127, 127)


def _int4(groups: Tensor) -> tuple[Tensor, Tensor]:
    peak = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))[..., 0]
    unit = torch.where(peak == 0, 1, peak)
    relative = groups / unit[..., None]  # so that no square overflows
    best_scale = torch.zeros_like(peak, dtype=torch.bfloat16)
    best_error = torch.full_like(peak, torch.inf)
    for steps in _INT4_PEAKS:
        scale = (peak / steps).bfloat16()
        whole = _rounded(groups, scale, -8, 7)
        error = whole.mul_((scale / unit)[..., None]).sub_(relative).square_().sum(-1)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
    return best_scale, _rounded(groups, best_scale, -8, 7)


def _rounded(groups: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
    """The whole numbers nearest to groups / scale; zeros where the scale is zero."""
    scale = scale.float()[..., None]
    divisor = torch.where(scale == 0, torch.inf, scale)
    return (groups / divisor).round_().clamp_(low, high)


def _pack(whole: Tensor) -> Tensor:
    """(rows, i) of -8 .. 7 to (rows, 16 ceil(i / 32)) uint8."""
    codes = torch.nn.functional.pad(whole, (0, -whole.shape[-1] % _RUN)).add_(8).to(torch.uint8)
    low, high = codes.unflatten(-1, (-1, 2, _RUN // 2)).unbind(-2)
    return (low | high << 4).flatten(-2)


def _unpack(data: Tensor, n_columns: int) -> Tensor:
    """(..., o, bytes) uint8 to (..., o, i) int8."""
    runs = data.unflatten(-1, (-1, _RUN // 2))
    codes = torch.stack((runs & 15, runs >> 4), dim=-2).flatten(-3)
    return codes[..., :n_columns].to(torch.int8) - 8
