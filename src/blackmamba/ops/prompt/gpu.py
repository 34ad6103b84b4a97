"""Launches of kernels.py and norm.cu. No gradient; tensors are contiguous.

Letters: b batch, l sequence, t tokens (b l), m d_model, d d_inner, n d_state, e experts, v
vocabulary.
"""

import ctypes
import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blackmamba.ops import gpu
from blackmamba.ops.gpu import cuda

MOST_EXPERTS = 16
"""That a program has sums for."""
FEW = 4096
"""Tokens up to which `norm` chooses by a router faster than two kernels do: 21.5 against 26.9 us of
2,048 of width 1152 on an H200, 91.3 against 77.6 of 16,384."""
_ROWS, _WARPS = 1, 1
_BLOCK = 128  # columns at a time: 16 bytes of float32 a thread


@dataclasses.dataclass(frozen=True)
class Routes:
    """Which expert each token goes to."""

    expert_ids: Tensor
    """(t,) int64."""
    gate: Tensor
    """(t,) float32: the sigmoid of the expert's logit."""


@dataclasses.dataclass(frozen=True)
class Places:
    """Which tokens each expert has, in rows of as many places as there are tokens."""

    counts: Tensor
    """(e,) int32: how many they are, and of how many places there is something in each row."""
    order: Tensor
    """(e, t) int32: which they are."""
    gate: Tensor
    """(e, t) float32: the sigmoid of the expert's logit."""


def routable(weight: Tensor) -> bool:
    """Whether `norm` can choose by a router of this weight, (e, m)."""
    return weight.dtype == torch.float32 and 1 <= len(weight) <= MOST_EXPERTS


def norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    dtype: torch.dtype,
    *,
    update: Tensor | None = None,
    ids: Tensor | None = None,
    stream: torch.dtype | None = None,
    router: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Routes | None]:
    """The residual stream, its RMSNorm, and by that the choice of an expert.

    Args:
        x: (t, m), the stream; or (v, m), the embedding, if there are `ids`.
        weight: (m,), eps: of the norm.
        dtype: of the norm.
        update: (t, m), added to x first, in x's own memory.
        ids: (t,) int64, the rows of x that the stream consists of.
        stream: dtype of the stream, if there are `ids`.
        router: float32 (e, m), times the norm's weight, and the bias (e,); `routable`. Its logits
            are of the norm before that is rounded to `dtype`.
    """
    m = x.shape[1]
    total, t, source, other = x, len(x), 0, x
    if ids is not None:
        t, source, other = len(ids), 2, ids
        total = x.new_empty(t, m, dtype=stream)
    elif update is not None:
        source, other = 1, update
    y = x.new_empty(t, m, dtype=dtype)
    routes, n_experts, (columns, bias) = None, 0, router or (weight, weight)
    if router is not None:
        n_experts = len(columns)
        routes = Routes(x.new_empty(t, dtype=torch.int64), x.new_empty(t, dtype=torch.float32))
    expert_ids, gate = (y, y) if routes is None else (routes.expert_ids, routes.gate)

    if t:
        gpu.launch(
            _kernels().norm_kernel, (-(-t // _ROWS),),
            x, other, weight, eps, total, y, columns, bias, expert_ids, gate, t, m,
            SOURCE=source, ROWS=_ROWS, BLOCK=_BLOCK, BLOCKS=-(-m // _BLOCK), E=n_experts,
            num_warps=_WARPS,
        )  # fmt: skip
    return total, y, routes


@dataclasses.dataclass(frozen=True)
class NormCut:
    """How `norm_and_choice` is cut into programs."""

    rows: int
    """Of a warp at a time."""
    warps: int


NORM_CUTS = (NormCut(1, 16), NormCut(2, 16))
"""The first is used: 67.5 us of 16,384 tokens of width 1152 on an H200, 14.7 of 2,048; 69.1 and
14.5."""
_WIDEST = 2048  # what registers hold of a row
_MOST_SHARED = 96 * 1024


def chooses(x: Tensor, update: Tensor | None, dtype: torch.dtype, router: Tensor) -> bool:
    """Whether `norm_and_choice` can take these."""
    return (
        update is not None
        and cuda.runs_on(x)
        and (x.dtype, update.dtype, dtype) == (torch.float32, torch.bfloat16, torch.bfloat16)
        and routable(router)
        and x.shape[1] % 4 == 0
        and x.shape[1] <= _WIDEST
        and _shared_bytes(router) <= _MOST_SHARED
        and all(t.is_contiguous() and t.data_ptr() % 16 == 0 for t in (x, update, router))
    )


def norm_and_choice(
    x: Tensor,
    update: Tensor,
    weight: Tensor,
    eps: float,
    router: tuple[Tensor, Tensor],
    cut: NormCut = NORM_CUTS[0],
) -> tuple[Tensor, Routes]:
    """`norm` of x + update with a choice, in CUDA C++ and in bfloat16: y, and which expert.

    Args:
        x: (t, m) float32, which the sum is written to.
        update: (t, m) bfloat16.
        weight, eps, router: as for `norm`; see `chooses`.
    """
    t = len(x)
    y = torch.empty_like(update)
    routes = Routes(x.new_empty(t, dtype=torch.int64), x.new_empty(t, dtype=torch.float32))
    found = {"y": y, "ids": routes.expert_ids, "gate": routes.gate}
    _choose(x, update, weight, eps, router, cut, found)
    return y, routes


def norm_and_places(
    x: Tensor,
    update: Tensor,
    weight: Tensor,
    eps: float,
    router: tuple[Tensor, Tensor],
    counts: Tensor,
    cut: NormCut = NORM_CUTS[0],
) -> tuple[Tensor, Places]:
    """`norm_and_choice` with y where experts read it: (e, t, m), of which as many rows of each
    expert are written as it has tokens. Which token's row comes first is left to chance, by
    `Places.order`; nothing else is.

    Args:
        counts: (e,) int32, zeros, which become those of `Places`.
    """
    (t, m), e = x.shape, len(router[0])
    y = update.new_empty(e, t, m)
    order, gate = (x.new_empty(e, t, dtype=dtype) for dtype in (torch.int32, torch.float32))
    found = {"y": y, "gate": gate, "counts": counts, "order": order}
    _choose(x, update, weight, eps, router, cut, found)
    return y, Places(counts, order, gate)


def _choose(
    x: Tensor,
    update: Tensor,
    weight: Tensor,
    eps: float,
    router: tuple[Tensor, Tensor],
    cut: NormCut,
    found: dict[str, Tensor],
) -> None:
    (t, m), (columns, bias) = x.shape, router
    if not t:
        return
    shared = _shared_bytes(columns)
    flags = {"WIDTH": m, "EXPERTS": len(columns), "ROWS": cut.rows, "WARPS": cut.warps}
    flags |= {"PLACES": int("order" in found), "SHARED": shared}
    tensors = {"x": x, "update": update, "weight": weight, "router": columns, "bias": bias, **found}
    arguments = _Norm(t=t, eps=eps, **{name: v.data_ptr() for name, v in tensors.items()})
    blocks = min(gpu.processors(x), -(-t // cut.rows))
    sources, index = (cuda.NUMBERS, Path(__file__).with_name("norm.cu")), x.device.index
    kernel = cuda.kernel(sources, "norm_and_choice", tuple(sorted(flags.items())), index)
    kernel.launch(blocks, 32 * cut.warps, arguments, shared)


def _shared_bytes(router: Tensor) -> int:
    """What the router and the norm's weight take there."""
    n_experts, m = router.shape
    return (n_experts + 1) * -(-m // 128) * 128 * 4


class _Norm(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_uint64) for name in ("x", "update", "weight", "router", "bias")),
        *((name, ctypes.c_uint64) for name in ("y", "ids", "gate", "counts", "order")),
        ("t", ctypes.c_int),
        ("eps", ctypes.c_float),
    )


def fill_pads_(dt: Tensor, lengths: Tensor) -> None:
    """dt (b, l, d) = -infinity from each row's length on; lengths (b,)."""
    b, l, d = dt.shape
    rows, block = 64, 128
    gpu.launch(
        _kernels().fill_pads_kernel, (-(-d // block), -(-l // rows), b),
        dt, lengths, l, d, dt.stride(1), ROWS=rows, BLOCK=block, num_warps=4,
    )  # fmt: skip


def last_output(state: Tensor, C: Tensor, x: Tensor, z: Tensor, D: Tensor, last: Tensor) -> Tensor:
    """What a Mamba layer's scan and gate give of each row's last token: (b, d).

    Args:
        state: (b, d, n), float32, that these tokens leave.
        C: (t, n), with any stride of rows, and x: (t, d): of all tokens.
        z: (b, d), of the last ones.
        D: (d,), float32.
        last: (b,) int64: where the last ones are among all.
    """
    (b, d, n), block = state.shape, 64
    y = z.new_empty(b, d)
    gpu.launch(
        _kernels().last_kernel, (-(-d // block), b),
        state, C, x, z, D, last, y, d, n, C.stride(0),
        BLOCK=block, N=1 << (n - 1).bit_length(), num_warps=2,
    )  # fmt: skip
    return y


def _kernels() -> Any:
    """kernels.py, whose language Python's types do not describe; triton is imported only now."""
    from blackmamba.ops.prompt import kernels

    return kernels
