"""Launches of projected.cu: convolution, x_proj and dt_proj in one kernel, on NVIDIA's Hopper.

Letters: b batch, l sequence, d d_inner, n d_state, r dt_rank, k d_conv.
"""

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from blackmamba.ops.gpu import cuda
from blackmamba.ops.gpu import hopper as units

_SOURCES = cuda.NUMBERS, cuda.HOPPER, Path(__file__).with_name("projected.cu")
_TAPS, _ROWS, _OF_GROUP, _DEEP, _MOST_COLUMNS, _THREADS = 4, 128, 64, 128, 128, 512  # as there
FULL = 0.7
"""Of the blocks of 128 tokens that a GPU could do in as many turns, the share that has to be there.
On an H200, d = 2304, 6 x 2,048 tokens (73 % of 132) take 73 us, and 84 by three kernels; 4 x 2,048
take 68, and 61."""


def fits(
    x: Tensor, conv_weight: Tensor, conv_bias: Tensor, x_proj: Tensor, dt_proj: Tensor
) -> bool:
    """Whether the kernel takes these: see `projected`."""
    weights = conv_weight, conv_bias, x_proj
    return (
        units.runs_on(x.device)
        and all(t.dtype == torch.bfloat16 for t in (x, *weights, dt_proj))
        and conv_weight.shape[1] == _TAPS
        and x.numel() > 0
        and x.shape[2] % 8 == 0
        and len(x_proj) <= _MOST_COLUMNS
        and dt_proj.shape[1] > 0
        and x.stride(2) == dt_proj.stride(1) == 1
        and all(stride % 8 == 0 for stride in (*x.stride()[:2], dt_proj.stride(0)))
        and all(t.data_ptr() % 16 == 0 for t in (x, *weights, dt_proj))
        and all(t.is_contiguous() for t in weights)
    )


def is_enough(x: Tensor) -> bool:
    """Whether one kernel is faster than three for x (b, l, d): a block takes its time, so most
    multiprocessors must have one in each turn."""
    b, l, _ = x.shape
    blocks = b * -(-l // _ROWS)
    at_once = torch.cuda.get_device_properties(x.device).multi_processor_count
    return blocks >= FULL * at_once * -(-blocks // at_once)


def projected(
    x: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    x_proj: Tensor,
    dt_proj: Tensor,
    *,
    before: Tensor | None = None,
    lengths: Tensor | None = None,
    seq_idx: Tensor | None = None,
    last: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x behind convolution and SiLU, x_proj's product, dt_proj's, and what to remember of x.

    Args:
        x: (b, l, d) bfloat16, as all weights; channels lie side by side.
        conv_weight: (d, k) with k = 4, conv_bias: (d,).
        x_proj: (r + 2 n, d), at most 128 rows; dt_proj: (d, r), rows begin at whole 16 bytes.
        before: (b, d, k - 1), the convolution's inputs before x; None: zeros.
        lengths: (b,) int64: rows are right-padded; a pad's dt is minus infinity, so that it changes
            no memory.
        seq_idx: (b, l), any integers: which document a token is of.
        last: whether to return the last k - 1 real inputs of each row.
    Returns:
        y (b, l, d), columns (b, l, r + 2 n) with whole 16 bytes a token, dt (b, l, d), and (b, d,
        k - 1) or nothing; all bfloat16.
    """
    (b, l, d), (_, r), n_columns = x.shape, dt_proj.shape, len(x_proj)
    y, dt = x.new_empty(b, l, d), x.new_empty(b, l, d)
    columns = x.new_empty(b, l, -(-n_columns // 8) * 8)
    kept = x.new_empty(b, d, _TAPS - 1) if last else x.new_empty(0)
    if seq_idx is not None and seq_idx.dtype not in (torch.int32, torch.int64):
        seq_idx = seq_idx.long()
    flags = {"WIDTH": d, "RANK": r, "COLUMNS": n_columns, "LAST": int(last), "SHARED": _SHARED}
    flags |= {"HAS_BEFORE": int(before is not None), "HAS_LENGTHS": int(lengths is not None)}
    flags["SEQ"] = 0 if seq_idx is None else seq_idx.element_size()
    arguments = _Arguments()
    boxes = {"x": (x, _OF_GROUP + _TAPS - 1), "y": (y, _OF_GROUP)}
    boxes |= {"x_proj": (x_proj, _MOST_COLUMNS), "dt_proj": (dt_proj, _DEEP)}
    for name, (matrix, rows) in boxes.items():
        apart = matrix.stride()[:-1]
        found = units.tensor_map(matrix.data_ptr(), tuple(matrix.shape), apart, rows)
        setattr(arguments, name, found)
    tensors = {
        "weight": conv_weight, "bias": conv_bias, "lengths": lengths, "seq": seq_idx,
        "before": None if before is None else before.contiguous(),
        "columns": columns, "dt": dt, "last": kept,
    }  # fmt: skip
    for name, tensor in tensors.items():
        if tensor is not None:
            setattr(arguments, name, tensor.data_ptr())
    if seq_idx is not None:
        arguments.seq_b, arguments.seq_l = seq_idx.stride()
    arguments.l, arguments.tiles = l, -(-l // _ROWS)
    index = x.device.index
    kernel = cuda.kernel(_SOURCES, "projected", tuple(sorted(flags.items())), index, True)
    kernel.launch(b * arguments.tiles, _THREADS, arguments, _SHARED)
    return y, columns[..., :n_columns], dt, kept


def _shared_bytes() -> int:
    """As projected.cu's `Shared`: the two matrices of the first product, in two places each."""
    of_x = -(-(_OF_GROUP + _TAPS - 1) // 8) * 8
    rows = 2 * 2 * (2 * of_x + _ROWS + _MOST_COLUMNS)
    n_barriers, n_counts = 10, 6
    return rows * units.COLUMNS * 2 + 8 * n_barriers + 4 * n_counts + 1024  # for alignment


_SHARED = _shared_bytes()


class _Arguments(ctypes.Structure):
    _fields_ = (
        *((name, units.TensorMap) for name in ("x", "y", "x_proj", "dt_proj")),
        *((name, ctypes.c_uint64) for name in ("weight", "bias", "before", "lengths", "seq")),
        *((name, ctypes.c_uint64) for name in ("columns", "dt", "last")),
        *((name, ctypes.c_int64) for name in ("seq_b", "seq_l")),
        *((name, ctypes.c_int) for name in ("l", "tiles")),
        ("_", ctypes.c_int * 10),  # whole 64 bytes, as in projected.cu
    )
